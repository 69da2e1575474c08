"""Rows as sequences of moves: one a decision, or several that halve its options until one is left."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.solvers.strategies.turns import Turns
from espalier.space import Space
from espalier.space.decisions import Categorical, Real

Codes = NDArray[Any]

_HALVINGS = 6  # of a real decision


class Moves:
    """Which moves make a row: decisions in `turns.order`, each with its levels in the move table.

    `levels[j]` are the columns of the table that belong to decision j, `branches[t]` how many
    moves column t has. `halved[j]` says whether decision j is halved (its moves are 0: the lower
    half, 1: the upper), else its only move is its code.
    """

    def __init__(self, space: Space, bisect: bool) -> None:
        self.space = space
        self.turns = Turns(space)
        self.halved: list[bool] = []
        self.levels: list[range] = []
        self.branches: list[int] = []
        for decision in space.decisions:
            real = isinstance(decision, Real)
            long = bisect and not isinstance(decision, Categorical) and decision.count > 2
            self.halved.append(real or long)
            depth = _HALVINGS if real else math.ceil(math.log2(decision.count)) if long else 1
            self.levels.append(range(len(self.branches), len(self.branches) + depth))
            self.branches += [2 if real or long else decision.count] * depth

    def width(self, j: int) -> float:
        """The length of what is halved: the number of options, or 1 for a real decision."""
        decision = self.space.decisions[j]
        return 1.0 if isinstance(decision, Real) else float(decision.count)

    def spot(self, j: int, codes: Codes) -> NDArray[np.float64]:
        """Where codes of decision j lie from 0 to `width(j)`."""
        decision = self.space.decisions[j]
        if not isinstance(decision, Real):
            return codes.astype(np.float64)
        if decision.log:
            return np.log(codes / decision.low) / math.log(decision.high / decision.low)
        return np.asarray((codes - decision.low) / (decision.high - decision.low))

    def code(self, j: int, spot: float) -> float:
        """The code at a place from 0 up to, and without, `width(j)`."""
        decision = self.space.decisions[j]
        if not isinstance(decision, Real):
            return math.floor(spot)
        if decision.log:
            value: float = decision.low * (decision.high / decision.low) ** spot
        else:
            value = decision.low + (decision.high - decision.low) * spot
        return min(max(value, decision.low), decision.high)

    def fine(self, j: int) -> int:
        """How many cells a real decision is halved into; 0 for the others."""
        return 2**_HALVINGS if isinstance(self.space.decisions[j], Real) else 0

    def ends(self, j: int, low: float, high: float) -> bool:
        """Whether an interval holds one option, so that there is nothing to halve."""
        return high - low <= 1 and not isinstance(self.space.decisions[j], Real)

    def middle(self, j: int, low: float, high: float) -> float:
        """Where an interval is halved."""
        real = isinstance(self.space.decisions[j], Real)
        return (low + high) / 2 if real else (low + high) // 2

    def of(self, codes: Codes) -> NDArray[np.int64]:
        """The move table `(n, t)` of canonical rows; -1 where there is none to make."""
        out = np.full((len(codes), len(self.branches)), -1, dtype=np.int64)
        active = self.space.active(codes)
        for j, levels in enumerate(self.levels):
            if not self.halved[j]:
                out[:, levels[0]] = np.where(active[:, j], codes[:, j], -1)
                continue
            spot = self.spot(j, codes[:, j])
            low, high = np.zeros(len(codes)), np.full(len(codes), self.width(j))
            real = isinstance(self.space.decisions[j], Real)
            for level in levels:
                middle = (low + high) / 2 if real else (low + high) // 2
                upper = spot >= middle
                open_ = active[:, j] if real else active[:, j] & (high - low > 1)
                out[:, level] = np.where(open_, upper, -1)
                low, high = (
                    np.where(open_ & upper, middle, low),
                    np.where(open_ & ~upper, middle, high),
                )
        return out
