"""Several subnets in one forward and backward pass: each sample of a batch runs its own.

A batch is cut into as many parts as there are subnets, and each part is masked to its subnet, so
that a step costs one pass of the largest network however many subnets it teaches (Liao, Karaman &
Sze, Searching for Efficient Multi-Stage Vision Transformers, 2021,
https://arxiv.org/abs/2109.00642, multi-architectural sampling).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from espalier.errors import EspalierError, SpaceError
from espalier.space import Space
from espalier.train.onehot import one_hot, shares
from espalier.train.paths import Pass, Paths, stream
from espalier.train.running import device_of

# Whether each row of codes `(n, d)` may be trained: those near a budget, say.
Wanted = Callable[[NDArray[Any]], NDArray[np.bool_]]
_TRIES = 200


@dataclass(frozen=True)
class Masked(Pass):
    """One pass of several candidates, one-hot rows `{decision: (k, options)}`, on shares of a batch."""

    rows: Mapping[str, Tensor]

    def apply(self, supernet: Any, batch: int) -> None:
        """Mixes with weights of their own for each sample."""
        device = device_of(supernet)
        own = shares(self.rows, batch)
        supernet.mix({name: weights.to(device) for name, weights in own.items()})


@dataclass
class Together(Paths):
    """`subnets` random candidates a step, each on its share of the batch, in one pass.

    All learn from the targets. With `wanted` only such candidates are drawn. The supernet must be
    able to mix all its decisions with weights a sample, which elastic kernels can't.
    Errors: `SpaceError` where hardly any candidate is wanted.
    """

    subnets: int = 4
    wanted: Wanted | None = None
    _rows: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.subnets, bool) or self.subnets < 1:
            raise EspalierError(f"subnets is a whole number from 1, got {self.subnets!r}")

    def begin(self, space: Space, epoch: int, epochs: int, steps: int, seed: int) -> None:
        """Draws all candidates of the epoch."""
        codes = drawn(space, steps * self.subnets, stream(seed, epoch), self.wanted)
        self._rows = one_hot(space, space.decode(codes))

    def __call__(self, step: int) -> list[Masked]:
        """The one pass of the step's candidates."""
        own = slice(step * self.subnets, (step + 1) * self.subnets)
        return [Masked({name: table[own] for name, table in self._rows.items()})]

    def to_json(self) -> dict[str, Any]:
        """Its settings."""
        return {
            "method": "together",
            "subnets": self.subnets,
            "restricted": self.wanted is not None,
        }


def drawn(
    space: Space, n: int, rng: np.random.Generator, wanted: Wanted | None = None
) -> NDArray[Any]:
    """`n` random rows of codes `(n, d)`, only such as are wanted."""
    if wanted is None:
        return space.sample(n, rng)
    kept: list[NDArray[Any]] = []
    found = 0
    for _ in range(_TRIES):
        rows = space.sample(n, rng)
        kept.append(rows[wanted(rows)])
        found += len(kept[-1])
        if found >= n:
            return np.concatenate(kept)[:n]
    raise SpaceError(
        f"{found} of {_TRIES * n} random candidates are wanted and {n} are needed: want more of"
        " them"
    )
