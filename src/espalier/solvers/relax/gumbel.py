"""Sampled mixtures by the Gumbel-softmax trick: of SNAS and FBNet (soft) and GDAS (hard)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from espalier.solvers.relax.moment import Moment
from espalier.solvers.relax.relaxation import Logits, Relaxation
from espalier.solvers.relax.softmax import heat_of
from espalier.train.schedules import Schedule, scheduled

if TYPE_CHECKING:
    from espalier.nets.elastic.mixing import Mixture


class Gumbel(Relaxation):
    """Softmax of (log p + Gumbel noise) / temperature (Jang et al., 2017; Maddison et al., 2017).

    Soft: every option runs (SNAS, Xie et al., 2019; FBNet, Wu et al., 2019, which cools from 5 by
    0.956 an epoch). `hard`: only the sampled option runs, with weight 1 and the gradient of the soft
    weight, straight through (GDAS, Dong & Yang, 2019, which cools from 10 to 0.1).
    """

    def __init__(self, temperature: Schedule | float = 1.0, hard: bool = False) -> None:
        self.temperature, self.hard = scheduled(temperature), hard

    def weights(self, logits: Logits, moment: Moment) -> Mixture:
        """One sample for each decision; without noise where a moment has no generator."""
        if moment.generator is None:
            return dict(self.probabilities(logits))
        heat = heat_of(self.temperature, moment)
        noise = _noise(logits, moment.generator)
        out = {}
        for (name, found), drawn in zip(logits.items(), noise, strict=True):
            soft = torch.softmax((torch.log_softmax(found, 0) + drawn) / heat, 0)
            out[name] = _straight(soft) if self.hard else soft
        return out


def _noise(logits: Logits, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Standard Gumbel noise for every logit, drawn at once and taken to the device at once."""
    sizes = [len(found) for found in logits.values()]
    drawn = torch.empty(sum(sizes)).exponential_(generator=generator).clamp_(min=1e-20).log_()
    device = next(iter(logits.values())).device
    return torch.split(-drawn.to(device), sizes)


def _straight(soft: Tensor) -> Tensor:
    """1 at the largest and 0 elsewhere, exactly, with the gradient of `soft`."""
    hard = torch.zeros_like(soft).scatter_(0, soft.detach().argmax(0, keepdim=True), 1.0)
    return hard + (soft - soft.detach())
