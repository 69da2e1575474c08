"""How scores move: plain descent, whose steps are told in the scores' own scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from espalier.errors import EspalierError
from espalier.solvers.relax.problem import Problem
from espalier.solvers.relax.rules import Losses, Rule, backward


@dataclass(frozen=True)
class Descent(Rule):
    """Scores go down their gradient by `rate` on average (root mean square over all of them).

    Adam would move every score alike, however little the loss hangs on it; here the few that matter
    move and the order of the others stays. The rate falls as the weights' does. With `joint` weights and scores learn from one batch, else
    scores from data of their own, before the weights (first-order bi-level steps).
    """

    rate: float = 0.05
    joint: bool = False

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise EspalierError(f"the rate of a descent must be above 0, got {self.rate!r}")
        object.__setattr__(self, "splits", not self.joint)

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
        scores = [p for p in problem.architecture if p.grad is not None]
        with torch.no_grad():
            steps = [p.grad for p in scores if p.grad is not None]
            square = sum(float((g**2).sum()) for g in steps)
            size = (square / max(1, sum(g.numel() for g in steps))) ** 0.5
            peak = float(problem.optimiser.defaults["lr"])
            falling = float(problem.optimiser.param_groups[0]["lr"]) / peak
            for score, step in zip(scores, steps, strict=True):
                score.sub_(step, alpha=falling * self.rate / max(size, 1e-20))
                score.grad = None
        problem.descend("architecture")  # no gradient is left: only the relaxation's own hook
