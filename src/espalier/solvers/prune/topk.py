"""The best units that fit: hard masks by scores under a budget (BiP, Zhang et al., NeurIPS 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from espalier.compress.masks import Bilinear
from espalier.errors import StudyError
from espalier.solvers.prune.budget import Budget
from espalier.solvers.prune.gates import UnitGates, largest, straight
from espalier.solvers.relax.moment import Moment
from espalier.solvers.relax.relaxation import Logits

if TYPE_CHECKING:
    from espalier.nets.elastic.mixing import Mixture

_HALVINGS = 30


class TopUnits(UnitGates):
    """A score a unit; the units above one threshold for all groups run, as many as the budget allows.

    Scores begin as importances by the weights; `even`: with mean 1 in each group, else as they are,
    with mean 1 over all. With `curvature` the gradient knows that the weights follow the masks
    (`Bilinear`), else it passes straight through. The threshold is found anew every `every`
    architecture steps.
    """

    def __init__(
        self,
        budget: Budget,
        curvature: float | None = 1.0,
        even: bool = True,
        every: int = 1,
    ) -> None:
        self.budget, self.curvature, self.even, self.every = budget, curvature, even, every
        self._steps, self._threshold = 0, 0.0

    def start(
        self, supernet: Any, names: Sequence[str], generator: torch.Generator
    ) -> dict[str, nn.Parameter]:
        """The first scores, and the first threshold."""
        logits = super().start(supernet, names, generator)
        self._steps = 0
        self._threshold = self._found(logits)
        return logits

    def first(self, names: Sequence[str], generator: torch.Generator) -> dict[str, Tensor]:
        """Importances by the weights."""
        found = self.gated.importances(self.even)
        mean = torch.cat([found[name] for name in names]).mean()
        return {name: found[name] / mean for name in names}

    def weights(self, logits: Logits, moment: Moment) -> Mixture:
        """Hard masks; in architecture steps with the gradient of the scores."""
        masks = {name: self._mask(name, found) for name, found in logits.items()}
        if moment.phase != "architecture":
            return {name: mask.detach() for name, mask in masks.items()}
        if self.curvature is None:
            return masks
        out: dict[str, Any] = {n: Bilinear(mask, self.curvature) for n, mask in masks.items()}
        return out

    def kept(self, logits: Logits) -> dict[str, Tensor]:
        """How many run."""
        return {name: self._mask(name, found).sum() for name, found in logits.items()}

    def scores(self, logits: Logits) -> dict[str, Tensor]:
        """The scores as learned."""
        return {name: found.detach().clone() for name, found in logits.items()}

    def after_step(self, logits: Logits, before: Mapping[str, Tensor]) -> None:
        """Finds the threshold for the moved scores."""
        self._steps += 1
        if self._steps % self.every == 0:
            self._threshold = self._found(logits)

    def tensors(self) -> dict[str, Tensor]:
        """The threshold, and how many steps there were."""
        numbers = torch.tensor([self._threshold, self._steps], dtype=torch.float64)
        return {"threshold": numbers}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts them back. Errors: `StudyError` for a checkpoint of before they were kept."""
        if "threshold" not in tensors:
            raise StudyError(
                "the checkpoint is of an earlier version, without the threshold of its masks: remove it"
            )
        self._threshold, steps = tensors["threshold"].tolist()
        self._steps = int(steps)

    def _mask(self, name: str, found: Tensor) -> Tensor:
        with torch.no_grad():
            least = largest(found, self.gated.counts[name][0])
            hard = torch.maximum((found >= self._threshold).to(found.dtype), least)
        return straight(hard, found)

    @torch.no_grad()
    def _found(self, logits: Logits) -> float:
        """The lowest threshold within the budget."""
        every = torch.cat([found.flatten() for found in logits.values()]).sort().values.double()
        ordered = {n: np.sort(found.detach().cpu().double().numpy()) for n, found in logits.items()}
        low, high = 0, len(every)  # places in the sorted scores: how many are cut
        for _ in range(_HALVINGS):
            if low >= high:
                break
            middle = (low + high) // 2
            if self._over(ordered, float(every[middle])) > 0:
                low = middle + 1
            else:
                high = middle
        return float("inf") if low == len(every) else float(every[low])

    def _over(self, ordered: Mapping[str, Any], threshold: float) -> float:
        shares = []
        for name in self.budget.names:
            scores = ordered[name]
            kept = len(scores) - int(np.searchsorted(scores, threshold, "left"))
            shares.append(max(kept, self.gated.counts[name][0]) / len(scores))
        return self.budget.over(np.array(shares)) - 1e-9
