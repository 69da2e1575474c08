"""Each decision as a choice among few: its options, or equal parts of a long range."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.solvers.strategies.turns import Turns
from espalier.space import Space
from espalier.space.decisions import Categorical, Real

Codes = NDArray[Any]
Index = NDArray[np.int64]
Mask = NDArray[np.bool_]


class Bins:
    """`sizes[j]` is the number of choices of decision j: its options where there are up to
    `levels` of them or they have no order, else `levels` equal parts of its range."""

    def __init__(self, space: Space, levels: int) -> None:
        self.space = space
        self.turns = Turns(space)
        self.sizes = [
            d.count
            if isinstance(d, Categorical) or (d.count <= levels and not isinstance(d, Real))
            else levels
            for d in space.decisions
        ]

    def codes(self, j: int, choices: Index, rng: np.random.Generator) -> Codes:
        """Codes of decision j, drawn evenly within each row's choice."""
        decision, size = self.space.decisions[j], self.sizes[j]
        if not isinstance(decision, Real):
            if decision.count == size:
                return choices
            start = choices * decision.count // size
            end = (choices + 1) * decision.count // size
            return start + np.floor(rng.random(len(choices)) * (end - start)).astype(np.int64)
        share = (choices + rng.random(len(choices))) / size
        if decision.log:
            out = decision.low * (decision.high / decision.low) ** share
        else:
            out = decision.low + (decision.high - decision.low) * share
        return np.clip(out, decision.low, decision.high)

    def of(self, codes: Codes) -> tuple[Index, Mask]:
        """The choices `(n, d)` that canonical rows are, and which of them were to be made.

        Their columns are in the order of `turns`.
        """
        choices = np.zeros(codes.shape, dtype=np.int64)
        for j, (decision, size) in enumerate(zip(self.space.decisions, self.sizes, strict=True)):
            column = codes[:, j]
            if not isinstance(decision, Real):
                whole = column.astype(np.int64)
                # the part that `start <= code < end` of `codes` says
                at = whole if decision.count == size else ((whole + 1) * size - 1) // decision.count
            elif decision.log:
                share = np.log(column / decision.low) / math.log(decision.high / decision.low)
                at = np.minimum(np.floor(share * size), size - 1)
            else:
                share = (column - decision.low) / (decision.high - decision.low)
                at = np.minimum(np.floor(share * size), size - 1)
            choices[:, j] = at
        return choices[:, self.turns.order], self.space.active(codes)[:, self.turns.order]
