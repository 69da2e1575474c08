"""Soft thresholds: a keep ratio a group, learned through a differentiable cut (DSA, Ning et al., 2020)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from espalier.solvers.prune.gates import UnitGates, largest
from espalier.solvers.relax.moment import Moment
from espalier.solvers.relax.relaxation import Logits
from espalier.train.schedules import Schedule, linear, scheduled

if TYPE_CHECKING:
    from espalier.nets.elastic.mixing import Mixture

_HALVINGS = 30
_WHOLE = 1e-3  # the share of units that stays open to doubt, where all are kept


class SoftThreshold(UnitGates):
    """One number a group is learned: the share of its units that stays.

    Unit i is kept with probability p = 1 / (1 + (b / threshold)^-sharpness), b its importance by the
    present weights; the threshold is where the probabilities add up to the share, and the gradient
    reaches the share through it (implicit function). Masks are relaxed Bernoulli draws (Maddison et
    al., 2017) in steps, hard in evaluation. `begin`: the first shares.
    """

    def __init__(
        self,
        begin: Mapping[str, float] | float = 1.0,
        sharpness: Schedule | float | None = None,
        temperature: float = 0.3,
    ) -> None:
        self.begin = dict(begin) if isinstance(begin, Mapping) else begin
        self.sharpness = scheduled(linear(4.0, 40.0) if sharpness is None else sharpness)
        self.temperature = temperature

    def first(self, names: Sequence[str], generator: torch.Generator) -> dict[str, Tensor]:
        """The first shares `(1,)`."""
        begin = self.begin
        given = begin if isinstance(begin, Mapping) else dict.fromkeys(names, begin)
        return {name: torch.tensor([float(given[name])]) for name in names}

    def kept(self, logits: Logits) -> dict[str, Tensor]:
        """Share times units."""
        return {name: share[0] * self.gated.units[name] for name, share in logits.items()}

    def scores(self, logits: Logits) -> dict[str, Tensor]:
        """The importances that the threshold compares."""
        return self.gated.importances()

    def weights(self, logits: Logits, moment: Moment) -> Mixture:
        """Relaxed draws; hard masks in evaluation."""
        importances = self.gated.importances()
        if moment.generator is None:
            return {
                name: largest(importances[name], round(float(kept)))
                for name, kept in self.kept(logits).items()
            }
        sharpness = self.sharpness(moment.progress)
        chances = log_odds(list(logits.values()), [importances[n] for n in logits], sharpness)
        out = {}
        for name, odds in zip(logits, chances, strict=True):
            u = torch.rand(odds.shape, generator=moment.generator).clamp_(1e-6, 1 - 1e-6)
            noise = torch.logit(u).to(odds.device)
            out[name] = torch.sigmoid((odds + noise) / self.temperature)
        return out

    def after_step(self, logits: Logits, before: Mapping[str, Tensor]) -> None:
        """Shares stay between that of the smallest option and 1."""
        with torch.no_grad():
            for name, share in logits.items():
                counts = self.gated.counts[name]
                share.clamp_(counts[0] / counts[-1], 1.0)


def log_odds(
    shares: Sequence[Tensor], importances: Sequence[Tensor], sharpness: float
) -> list[Tensor]:
    """log(p / (1 - p)) of each unit, whose p add up to share times units; differentiable in shares."""
    size = max(len(b) for b in importances)
    logs = torch.stack([_padded(b.log(), size) for b in importances])
    real = torch.stack([_padded(torch.ones_like(b), size, 0.0) for b in importances])
    wanted = torch.cat(list(shares)) * real.sum(1)
    inside = wanted.detach().clamp(max=(1 - _WHOLE) * real.sum(1))
    margin = 20.0 / sharpness
    low = logs.amin(1) - margin
    high = torch.where(real > 0, logs, torch.full_like(logs, -1e9)).amax(1) + margin
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        sums = (torch.sigmoid(sharpness * (logs - middle[:, None])) * real).sum(1)
        too_many = sums > inside
        low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
    threshold = (low + high) / 2
    p = torch.sigmoid(sharpness * (logs - threshold[:, None])) * real
    slope = -sharpness * (p * (1 - p) * real).sum(1)  # of the sum, as the log threshold rises
    threshold = threshold + (wanted - wanted.detach()) / slope.clamp(max=-1e-6)
    odds = sharpness * (logs - threshold[:, None])
    return [row[: len(b)] for row, b in zip(odds, importances, strict=True)]


def _padded(values: Tensor, size: int, by: float | None = None) -> Tensor:
    filler = values[:1].detach() if by is None else values.new_full((1,), by)
    return torch.cat([values, filler.expand(size - len(values))])
