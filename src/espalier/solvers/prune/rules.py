"""How scores move: plain descent, whose steps are told in the scores' own scale."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from espalier.errors import EspalierError
from espalier.solvers.relax.problem import Problem
from espalier.solvers.relax.rules import Losses, Rule, backward


class Descent(Rule):
    """Scores go down their mean gradient by `rate` (root mean square over all of them).

    Adam would move every score alike, however little the loss hangs on it; here the few that matter
    move and the order of the others stays. The gradient is averaged over steps by `momentum`; the rate
    falls as the weights' does. With `joint` weights and scores learn from one batch, else scores from
    data of their own, before the weights (first-order bi-level steps).
    """

    def __init__(self, rate: float = 0.05, joint: bool = False, momentum: float = 0.9) -> None:
        if not rate > 0 or not 0 <= momentum < 1:
            raise EspalierError(
                "a descent takes a rate above 0 and a momentum in 0..1, below 1, got "
                f"{rate!r} and {momentum!r}"
            )
        self.rate, self.joint, self.momentum = rate, joint, momentum
        self.splits = not joint
        self._means: list[Tensor] = []

    def start(self, problem: Problem) -> None:
        """Forgets an earlier search."""
        self._means = [torch.zeros_like(p) for p in problem.architecture]

    def step(self, problem: Problem, architecture: bool) -> Losses:
        """One step of the scores, if asked, and one of the weights."""
        found: Tensor | None = None
        if architecture and self.joint:
            loss = problem.loss("train", "both")
            backward(loss, [*problem.weights, *problem.architecture])
            self._move(problem)
            problem.descend("weights")
            return Losses(loss.detach(), loss.detach())
        if architecture:
            found = problem.loss("validation", "architecture")
            backward(found, problem.architecture)
            self._move(problem)
        loss = problem.loss("train", "weights")
        backward(loss, problem.weights)
        problem.descend("weights")
        return Losses(loss.detach(), None if found is None else found.detach())

    def _move(self, problem: Problem) -> None:
        peak = float(problem.optimiser.defaults["lr"])
        falling = float(problem.optimiser.param_groups[0]["lr"]) / peak
        with torch.no_grad():
            for mean, score in zip(self._means, problem.architecture, strict=True):
                step = torch.zeros_like(score) if score.grad is None else score.grad
                mean.lerp_(step, 1 - self.momentum)
                score.grad = None
            square = sum(float((m**2).sum()) for m in self._means)
            size = (square / max(1, sum(m.numel() for m in self._means))) ** 0.5
            for mean, score in zip(self._means, problem.architecture, strict=True):
                score.sub_(mean, alpha=falling * self.rate / max(size, 1e-20))
        problem.descend("architecture")  # no gradient is left: only the relaxation's own hook

    def tensors(self) -> dict[str, Tensor]:
        """The mean gradients."""
        return {str(i): mean for i, mean in enumerate(self._means)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts them back."""
        for i, mean in enumerate(self._means):
            mean.copy_(tensors[str(i)])
