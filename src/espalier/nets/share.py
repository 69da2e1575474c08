"""What a superkernel needs of itself: thresholds on the norms of its parts, and a mask of channels.

The indicators of Single-Path NAS (Stamoulis et al., 2019), with norms that are relative.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from espalier.nets.elastic import Dim, Elastic
from espalier.nets.elastic.core import Maker
from espalier.nets.elastic.dims import Choices, options, size
from espalier.nets.elastic.masks import aligned
from espalier.nets.elastic.mixing import Weights, no_gates, resolve
from espalier.space import Decision

START = 0.8  # thresholds at first, as a share of the norm of what is inside
SLOPE = 0.25  # width of the sigmoid that stands for the step in backward
# An indicator is this far from 0 and 1, so that both sides run and both get gradients.
AWAY = 1e-6


class Share(Elastic):
    """Weighs the channels `(b, c, h, w)` of a mixture of expansions, and holds a layer's thresholds.

    Of a plain network nothing of it is left.
    """

    below: Tensor  # 1 where a channel is one of an option's, (options, channels)

    def __init__(
        self, inner: Dim, kernel: Dim, expansion: Decision | float, keep: Decision | None
    ) -> None:
        super().__init__()
        found = {"kernel": kernel, "expansion": expansion, "keep": keep}
        self.chosen = {part: d for part, d in found.items() if isinstance(d, Decision)}
        for part, decision in self.chosen.items():  # t5, t6 and t3 of the paper
            thresholds = torch.full((len(options(decision)) - 1,), START)
            self.register_parameter(part, nn.Parameter(thresholds))
        every: list[Choices] = [{d.name: o} for d in self.decisions() for o in options(d)]
        self.widths = tuple(size(inner, one) for one in every or [{}])
        below = torch.arange(max(self.widths)) < torch.tensor(self.widths)[:, None]
        self.register_buffer("below", below.float(), persistent=False)

    def decisions(self) -> tuple[Decision, ...]:
        return (self.chosen["expansion"],) if "expansion" in self.chosen else ()

    def settle(self, choices: Choices) -> None:
        if self._mixed is not None:
            self._mixed = None

    def mix(self, weights: Mapping[str, Weights]) -> None:
        found = resolve(weights, self.decisions())
        no_gates(found.values(), found)
        for mixed in found.values():
            self._mixed = mixed.weights

    def forward(self, x: Tensor) -> Tensor:
        if self._mixed is None:
            return x
        weights: Tensor = self._mixed
        mask = weights @ self.below.to(weights)
        return x * aligned(mask[..., : x.shape[1]], x, 1)

    def plain(self, make: Maker) -> nn.Module:
        return nn.Identity()

    def indicators(self, weight: Tensor) -> dict[str, Tensor]:
        """Weights of the layer's decisions, `(options,)` each, of a depthwise kernel `(c, 1, k, k)`."""
        energy = weight[:, 0].square()
        first = energy[: self.widths[0]]
        norms: dict[str, Tensor] = {}
        if "kernel" in self.chosen:
            norms["kernel"] = _relative(_rings(energy, _numbers(self.chosen["kernel"])))
        if "expansion" in self.chosen:
            ends = (0, *self.widths)
            groups = [energy[a:b].mean() for a, b in pairwise(ends)]
            norms["expansion"] = _relative(groups)
        if "keep" in self.chosen:  # relative to a fresh kernel: see `elastic.core.initialise`
            norms["keep"] = (first.mean() * (energy[0].numel() / 2)).reshape(1)
        return {
            self.chosen[part].name: _nested(_step(norm - self.get_parameter(part)))
            for part, norm in norms.items()
        }


def _numbers(decision: Decision) -> tuple[int, ...]:
    return tuple(int(option) for option in options(decision))


def _rings(energy: Tensor, sides: Sequence[int]) -> list[Tensor]:
    """The mean of `energy` `(c, k, k)` over the smallest kernel, then over each ring around it."""
    away = (torch.arange(energy.shape[-1], device=energy.device) - energy.shape[-1] // 2).abs()
    distance = torch.maximum(away[:, None], away[None])
    halves = [-1, *(side // 2 for side in sides)]
    return [energy[:, (distance > a) & (distance <= b)].mean() for a, b in pairwise(halves)]


def _relative(norms: Sequence[Tensor]) -> Tensor:
    """The norms of the outer parts, as shares of that of the first."""
    return torch.stack(list(norms[1:])) / norms[0].clamp_min(1e-12)


def _step(x: Tensor) -> Tensor:
    """1 where `x` is above 0, else 0; a sigmoid in backward."""
    soft = torch.sigmoid(x / SLOPE)
    hard = (x > 0).to(x.dtype).clamp(AWAY, 1 - AWAY)
    return soft + (hard - soft).detach()


def _nested(steps: Tensor) -> Tensor:
    """Weights of n + 1 options from n indicators, each of which needs those before it."""
    reached = torch.cat([steps.new_ones(1), steps.cumprod(0)])
    return reached - torch.cat([reached[1:], steps.new_zeros(1)])
