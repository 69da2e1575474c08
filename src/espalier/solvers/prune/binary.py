"""Binary gates on units, learned by themselves (Pruning-as-Search, Li et al., IJCAI 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from espalier.solvers.prune.gates import UnitGates, largest, straight
from espalier.solvers.relax.moment import Moment
from espalier.solvers.relax.relaxation import Logits

if TYPE_CHECKING:
    from espalier.nets.elastic.mixing import Mixture

_SPREAD = 1e-3


class BinaryUnits(UnitGates):
    """A number a unit: above `threshold` the unit is on; the gradient passes straight through.

    As many as the smallest option wants are on in any case, those with the largest numbers. Numbers
    stay in 0..1, so that no unit moves out of reach, and a unit that is off can come back. Units start
    at `begin`, alike, or `spread` apart between the least and the most important in their group.
    """

    def __init__(self, threshold: float = 0.5, begin: float = 0.6, spread: float = 0.0) -> None:
        self.threshold, self.begin, self.spread = threshold, begin, spread

    def first(self, names: Sequence[str], generator: torch.Generator) -> dict[str, Tensor]:
        """`begin` and what the rank of importance adds, but for a thousandth that breaks ties."""
        found, out = self.gated.importances(), {}
        for name in names:
            units = self.gated.units[name]
            rank = found[name].cpu().argsort().argsort().float() / max(1, units - 1)
            drawn = torch.rand(units, generator=generator)
            out[name] = self.begin + self.spread * (rank - 0.5) - _SPREAD * drawn
        return out

    def weights(self, logits: Logits, moment: Moment) -> Mixture:
        """Masks of 0 and 1."""
        return {name: self._mask(name, found) for name, found in logits.items()}

    def kept(self, logits: Logits) -> dict[str, Tensor]:
        """How many are on."""
        return {name: self._mask(name, found).sum() for name, found in logits.items()}

    def scores(self, logits: Logits) -> dict[str, Tensor]:
        """The numbers themselves."""
        return {name: found.detach().clone() for name, found in logits.items()}

    def _mask(self, name: str, found: Tensor) -> Tensor:
        with torch.no_grad():
            least = largest(found, self.gated.counts[name][0])
            hard = torch.maximum((found > self.threshold).to(found.dtype), least)
        return straight(hard, found)

    def after_step(self, logits: Logits, before: Mapping[str, Tensor]) -> None:
        """Numbers stay in 0..1."""
        with torch.no_grad():
            for found in logits.values():
                found.clamp_(0.0, 1.0)
