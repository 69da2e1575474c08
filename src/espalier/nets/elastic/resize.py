"""The resolution of the input as a decision."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from espalier.nets.elastic.core import Elastic, Maker
from espalier.nets.elastic.dims import Choices, Dim, decisions, ends, size, text
from espalier.space import Decision


class Resize(Elastic):
    """Brings images `(b, c, H, W)` to height `resolution`, width in proportion, bilinearly.

    `shape` is the native `(c, H, W)`; nothing is done, and nothing is left of it in the plain
    network, where the resolution is the native one. So a network always takes the native shape.
    """

    def __init__(self, resolution: Dim, shape: Sequence[int]) -> None:
        super().__init__()
        self.resolution = resolution
        ends(resolution, "resolution")
        self._native = (int(shape[-2]), int(shape[-1]))
        self._size = self._native if decisions(resolution) else self._sides({})

    def decisions(self) -> tuple[Decision, ...]:
        return decisions(self.resolution)

    def _sides(self, choices: Choices) -> tuple[int, int]:
        height = size(self.resolution, choices)
        return height, max(1, round(height * self._native[1] / self._native[0]))

    def settle(self, choices: Choices) -> None:
        self._size = self._sides(choices)

    def forward(self, x: Tensor) -> Tensor:
        if self._size == self._native:
            return x
        if x.is_meta:  # only the shape is wanted, and torch's way to it imports its compiler
            return x.new_empty(*x.shape[:2], *self._size)
        return F.interpolate(x, size=self._size, mode="bilinear", align_corners=False)

    def plain(self, make: Maker) -> nn.Module:
        sides = self._sides(make.choices)
        if sides == self._native:
            return nn.Identity()
        return nn.Upsample(size=sides, mode="bilinear", align_corners=False)

    def extra_repr(self) -> str:
        return text(self.resolution)
