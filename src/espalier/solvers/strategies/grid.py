"""Grid search: an even sweep of the space, coarse levels before fine ones."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from espalier.errors import EspalierError
from espalier.solvers.strategies.fresh import Seen
from espalier.solvers.strategies.strategy import Array, Codes, Strategy
from espalier.space import Space
from espalier.space.decisions import Categorical, Decision, Real

_GOLDEN = (math.sqrt(5) - 1) / 2
_FINE = 2**40 + 1  # levels of a real decision where none are named: it never ends
_LONGEST = 4096  # rows looked at together
_SCAN = 100_000  # rows looked at in one ask before the rest is drawn


class Grid(Strategy):
    """Sweeps grids of 2, 3, 5, 9, ... levels a decision until every row was asked.

    The levels of ordinal, integer and real decisions are spread evenly, ends included (in the
    logarithm if log); a categorical decision has no coarse level: all of its options are in every
    grid. A real decision has `levels` levels at last; without, it is refined without end. Within a
    grid, rows are visited in golden-ratio steps from a random place (a lattice; Korobov, 1959), so
    that whenever it is stopped, each option was tried about as often as its neighbours. What it is
    told changes nothing.
    """

    name = "grid"
    learns = False

    def __init__(self, space: Space, seed: int = 0, levels: int | None = None) -> None:
        super().__init__(space, seed)
        if levels is not None and levels < 2:
            raise EspalierError(f"a grid has at least 2 levels of a real decision, got {levels}")
        self.levels = levels or _FINE
        self._seen = Seen(space)
        self._level = -1  # which grid; 0 is the coarsest
        self._place = 0  # where on the lattice
        self._left = 0  # places of this grid that were not visited
        self._grid: list[Codes] = []
        self._next_grid()

    def ask(self, n: int) -> Codes:
        """The next n rows of the sweep as codes; fewer at its end."""
        parts = [np.zeros((0, len(self.space)), dtype=self.space.dtype)]
        missing, looked, block = n, 0, n
        while missing > 0 and self._more():
            codes = self._rows(min(self._left, block))
            new = self._seen.new_rows(codes)[:missing]
            # what lies behind the last row taken stays to be visited
            visited = int(new[-1]) + 1 if len(new) == missing else len(codes)
            self._go(visited)
            parts.append(codes[new])
            self._seen.add(parts[-1])
            missing, looked = missing - len(new), looked + visited
            block = min(2 * block, _LONGEST)
            if looked > _SCAN:  # hardly any place of the grid is valid and new
                break
        if missing > 0 and (looked > _SCAN or len(self._seen) == 0):
            parts.append(self._seen.fresh(missing, self.rng))
        return np.concatenate(parts)

    def tell(self, codes: Codes, values: Array, violations: Array) -> None:
        """Remembers that the rows are known."""
        if len(codes):
            self._seen.add(codes)

    # --- the lattice ---------------------------------------------------------------------------

    def _more(self) -> bool:
        """Whether there is a place to visit; goes on to the next grid where one is done."""
        if len(self._seen) >= self.space.size:
            return False
        while self._left == 0:
            if all(len(g) == self._full(d) for g, d in self._pairs()):
                return False
            self._next_grid()
        return True

    def _next_grid(self) -> None:
        self._level += 1
        self._grid = self._codes()
        self._left = math.prod(map(len, self._grid))
        self._place = 0
        for codes in self._grid:  # a random place; the number of places may not fit 64 bits
            self._place = self._place * len(codes) + int(self.rng.integers(len(codes)))

    def _codes(self) -> list[Codes]:
        return [self._spread(d) for d in self.space.decisions]

    def _pairs(self) -> list[tuple[Codes, Decision]]:
        return list(zip(self._grid, self.space.decisions, strict=True))

    def _full(self, decision: Decision) -> int:
        return self.levels if isinstance(decision, Real) else decision.count

    def _spread(self, decision: Decision) -> Codes:
        """The codes of one decision in this grid."""
        count, parts = self._full(decision), 2**self._level
        if isinstance(decision, Categorical) or parts >= count - 1:
            index = np.arange(count)
        else:
            # halving: each grid holds the one before
            index = np.rint(np.arange(parts + 1) * ((count - 1) / parts)).astype(np.int64)
        if not isinstance(decision, Real):
            return index
        share = index / (count - 1)
        low, high = decision.low, decision.high
        if decision.log:
            return np.clip(low * (high / low) ** share, low, high)
        return np.clip(low + (high - low) * share, low, high)

    def _step(self) -> tuple[int, int]:
        """The step and the number of places; without common divisor, so that none is missed."""
        total = math.prod(map(len, self._grid))
        step = max(1, total * round(_GOLDEN * 10**15) // 10**15)
        while math.gcd(step, total) != 1:
            step += 1
        return step, total

    def _go(self, visited: int) -> None:
        step, total = self._step()
        self._place = (self._place + step * visited) % total
        self._left -= visited

    def _rows(self, n: int) -> Codes:
        """The next n places as canonical rows."""
        step, total = self._step()
        digits = np.empty((n, len(self._grid)), dtype=np.int64)
        place = self._place
        for i in range(n):
            rest = place
            for j in range(len(self._grid) - 1, -1, -1):
                rest, digits[i, j] = divmod(rest, len(self._grid[j]))
            place = (place + step) % total
        out = np.empty((n, len(self._grid)), dtype=self.space.dtype)
        for j, codes in enumerate(self._grid):
            out[:, j] = codes[digits[:, j]]
        return self.space.canonical(out)

    # --- state ---------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Where the sweep is, and everything asked, as plain JSON."""
        return {
            "strategy": self.name,
            "level": self._level,
            "place": str(self._place),
            "left": str(self._left),
            "seen": self._seen.to_json(),
            "rng": self.rng.bit_generator.state,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from `state()`."""
        self.require_own(state)
        self._level = state["level"]
        self._grid = self._codes()
        self._place, self._left = int(state["place"]), int(state["left"])
        self._seen = Seen.from_json(self.space, state["seen"])
        self.rng.bit_generator.state = state["rng"]
