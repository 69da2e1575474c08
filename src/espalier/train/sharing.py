"""A curriculum on the sharing extent: a supernet gets more blocks of weights as training goes on.

Zhou et al., CLOSE (2022): few weights shared by many edges learn fast, more weights tell networks
apart. So training begins with one block for all edges; each new one starts as a copy of the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from espalier.errors import EspalierError
from espalier.space import Space
from espalier.train.paths import Pass, Paths, Uniform


class Growing(Protocol):
    """What a curriculum needs of a supernet, such as `nets.close.CLOSENet`."""

    @property
    def blocks(self) -> int:
        """How many blocks there are now; kept with the weights."""

    @property
    def most_blocks(self) -> int:
        """How many blocks there can be."""

    def grow(self) -> None:
        """Adds one."""


@dataclass
class Curriculum(Paths):
    """The paths of another sampler, on a supernet that gets a block at each of some epochs.

    `at` are shares of the training, from 0 to 1: `(0.25, 0.5)` gives the second block after a
    quarter of the epochs, the third after half. How many blocks there are is kept with the weights,
    so a training that is resumed adds none twice.
    """

    supernet: Growing
    at: tuple[float, ...] = (0.2, 0.4, 0.6)
    paths: Paths = field(default_factory=Uniform)

    def __post_init__(self) -> None:
        self.at = tuple(self.at)
        if any(not 0 <= share <= 1 for share in self.at) or list(self.at) != sorted(self.at):
            raise EspalierError(f"a curriculum's shares rise from 0 to 1, got {self.at}")

    @classmethod
    def late(cls, supernet: Growing) -> Curriculum:
        """One block for the first half, the others one after the other in the second half.

        In a short training it ranked cells better than full sharing in four of five seeds, and
        better than blocks from a fifth on, as published, in three: benchmarks/one_shot_rank.py.
        """
        more = supernet.most_blocks - 1
        return cls(supernet, tuple(0.5 + 0.5 * i / more for i in range(more)))

    @property
    def module(self) -> nn.Module | None:  # type: ignore[override]
        """What the other sampler learns."""
        return self.paths.module

    def begin(self, space: Space, epoch: int, epochs: int, steps: int, seed: int) -> None:
        """Adds the blocks that are due, and begins the other sampler."""
        while self.supernet.blocks < self.due(epoch, epochs):
            self.supernet.grow()
        self.paths.begin(space, epoch, epochs, steps, seed)

    def due(self, epoch: int, epochs: int) -> int:
        """How many blocks an epoch, counted from 0, is trained with."""
        return 1 + sum(epoch >= round(share * epochs) for share in self.at)

    def __call__(self, step: int) -> Sequence[Pass]:
        """The other sampler's."""
        return self.paths(step)

    def learned(self, step: int, losses: Sequence[float]) -> None:
        """Tells the other sampler."""
        self.paths.learned(step, losses)

    def to_json(self) -> dict[str, Any]:
        """The shares, and the other sampler's settings."""
        return {"sharing": list(self.at), **self.paths.to_json()}
