"""What pruning adds to the loss: agreement with a budget, and with the original."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from espalier.errors import EspalierError
from espalier.solvers.prune.budget import Budget, Capped
from espalier.solvers.relax.moment import Moment
from espalier.solvers.relax.terms import On, Term, TermState
from espalier.train import losses
from espalier.train.schedules import Schedule, scheduled


class Consensus(Term):
    """Shares are pulled to ones within the budget: ADMM, as DSA does (Ning et al., ECCV 2020).

    Adds pull/2 |a - z + u|^2 for shares a; every `every` architecture steps z becomes the nearest
    shares to a + u within the budget, and u grows by a - z, so that what the loss resists adds up.
    """

    on: On = "architecture"
    name = "consensus"

    def __init__(
        self, budget: Budget, pull: float = 1.0, every: int = 5, coefficient: Schedule | float = 1.0
    ) -> None:
        if not pull > 0 or every < 1:
            raise EspalierError(
                f"consensus takes a pull above 0 and every of 1 or more, got {pull!r} and {every!r}"
            )
        self.budget, self.pull, self.every = budget, pull, every
        self.coefficient = scheduled(coefficient)
        self._asked = 0
        self._near: Tensor | None = None
        self._debt: Tensor | None = None

    def start(self, supernet: nn.Module) -> None:
        """Forgets an earlier search."""
        self._asked, self._near, self._debt = 0, None, None

    def __call__(self, moment: Moment, state: TermState) -> Tensor:
        """The squared distance, a scalar."""
        shares = self._shares(state.probabilities)
        if self._near is not None and self._debt is not None:  # a checkpoint's are on the CPU
            self._near, self._debt = self._near.to(shares), self._debt.to(shares)
        if self._near is None or self._debt is None:
            self._debt = torch.zeros_like(shares.detach())
            self._near = self._projected(shares.detach())
        elif self._asked % self.every == 0:
            self._near = self._projected(shares.detach() + self._debt)
            self._debt = self._debt + shares.detach() - self._near
        self._asked += 1
        return self.pull / 2 * ((shares - self._near + self._debt) ** 2).sum()

    def _shares(self, probabilities: Mapping[str, Tensor]) -> Tensor:
        every = []
        for name in self.budget.names:
            found = probabilities[name]
            counts = torch.as_tensor(self.budget.counts[name], dtype=found.dtype).to(found.device)
            every.append((found * counts).sum() / counts[-1])
        return torch.stack(every)

    def _projected(self, shares: Tensor) -> Tensor:
        near = self.budget.project(shares.cpu().double().numpy().astype(np.float64))
        return torch.from_numpy(near).to(shares)

    def tensors(self) -> dict[str, Tensor]:
        """z, u and how often they were asked for."""
        if self._near is None or self._debt is None:
            return {}
        return {"near": self._near, "debt": self._debt, "asked": torch.tensor(self._asked)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts them back."""
        if "near" in tensors:
            self._near, self._debt = tensors["near"], tensors["debt"]
            self._asked = int(tensors["asked"])


class Narrowing(Term):
    """(cost / target - 1)^2, whose target goes from the whole model's cost to the limit.

    It gets there after the share `over` of the search, so that units close one after the other and the
    weights can follow. The square draws to the limit from either side (Li et al., 2022).
    """

    on: On = "architecture"

    def __init__(
        self, capped: Capped, whole: float, over: float = 0.6, coefficient: Schedule | float = 10.0
    ) -> None:
        if not 0 < over <= 1:
            raise EspalierError(f"a target narrows over a share in 0..1, above 0, got {over!r}")
        self.cost, self.most, self.whole = capped.cost, capped.most, whole
        self.over, self.name, self.coefficient = over, capped.name, scheduled(coefficient)

    def __call__(self, moment: Moment, state: TermState) -> Tensor:
        """The squared distance to the present target, as a share of it."""
        left = max(0.0, 1 - moment.progress / self.over)
        target = self.most + (self.whole - self.most) * left
        wanted = {name: state.probabilities[name] for name in self.cost.names}
        return (self.cost(wanted) / target - 1) ** 2


class Original(Term):
    """How far the outputs are from those of the model as it was (Hinton et al., 2015)."""

    on: On = "both"
    name = "original"

    def __init__(self, model: nn.Module, coefficient: Schedule | float = 1.0) -> None:
        self._model = model.eval().requires_grad_(False)
        self.coefficient = scheduled(coefficient)

    def __call__(self, moment: Moment, state: TermState) -> Tensor:
        """Cross entropy between the distributions for labels, squared error for other targets."""
        with torch.no_grad():
            wanted = state.run(self._model, state.inputs)
        return losses.soft(state.outputs, wanted, state.targets)
