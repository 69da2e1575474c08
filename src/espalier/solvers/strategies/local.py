"""Local search: try the neighbours of the best rows, move, and start anew when none is better.

A strong baseline on tabular benchmarks: White, Nolen & Savani, "Exploring the Loss Landscape in
Neural Architecture Search" (UAI 2021, https://arxiv.org/abs/2005.02960); for several objectives
Den Ottelander et al., "Local Search is a Remarkably Strong Baseline for Neural Architecture
Search" (EMO 2021, https://arxiv.org/abs/2004.08996). It moves at the first better neighbour.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.errors import EspalierError
from espalier.problem import ranks
from espalier.solvers.strategies.fresh import Seen
from espalier.solvers.strategies.population import Index, Population, pack, unpack
from espalier.solvers.strategies.strategy import Array, Codes, Strategy
from espalier.space import Space

_LARGEST = 256  # rows of a front; on a plateau everything is in the front
_NEW, _CENTRE, _DONE = 0, 1, 2  # a row of the front: its neighbours are untried, being tried, tried


class LocalSearch(Strategy):
    """Draws `draws` rows, then asks the neighbours (one decision away) of the rows that no other
    row since the start dominates, in random order; where all were asked, it starts anew.

    With one objective that is the best row, and the search is hill climbing; with several it is
    Pareto local search (Paquete et al., 2004). Rows that break limits are compared by how much.
    """

    name = "local"
    learns = True

    def __init__(self, space: Space, seed: int = 0, draws: int = 10) -> None:
        super().__init__(space, seed)
        if draws < 1:
            raise EspalierError(f"a local search starts from at least 1 row, got draws={draws}")
        self.draws = draws
        self._seen = Seen(space)
        self._undrawn = draws  # of this start
        self._front: Population | None = None
        self._stage: NDArray[np.int8] = np.zeros(0, dtype=np.int8)  # of each row of the front
        self._queue = self._empty()  # neighbours of the centre that were not asked

    def ask(self, n: int) -> Codes:
        """The next n candidates as codes; fewer when the space has no others."""
        parts = [self._drawn(min(n, self._undrawn))]
        missing = n - len(parts[0])
        while missing > 0 and self._fill():
            parts.append(self._queue[:missing])
            self._queue = self._queue[missing:]
            self._seen.add(parts[-1])
            missing -= len(parts[-1])
        if missing > 0:
            self._front, self._undrawn = None, self.draws
            parts.append(self._drawn(missing))
        return np.concatenate(parts)

    def _drawn(self, n: int) -> Codes:
        """n rows to start from."""
        self._undrawn = max(self._undrawn - n, 0)
        return self._seen.fresh(n, self.rng)

    def _fill(self) -> bool:
        """Whether there is a neighbour to ask; goes on to the next centre where one is done."""
        self._queue = self._queue[self._seen.new_rows(self._queue)]
        while len(self._queue) == 0 and self._front is not None:
            self._stage[self._stage == _CENTRE] = _DONE
            untried = np.flatnonzero(self._stage == _NEW)
            if len(untried) == 0:
                break
            centre = untried[self.rng.integers(len(untried))]
            self._stage[centre] = _CENTRE
            around = self._seen.new(self.space.neighbours(self._front.codes[[centre]]))
            self._queue = around[self.rng.permutation(len(around))]
        return len(self._queue) > 0

    def tell(self, codes: Codes, values: Array, violations: Array) -> None:
        """Rows that nothing dominates join the front; those they dominate leave it."""
        if len(codes) == 0:
            return
        told = Population.told(codes, values, violations)
        self._seen.add(told.codes)
        known = set() if self._front is None else set(self.space.keys(self._front.codes).tolist())
        keys = self.space.keys(told.codes).tolist()
        # of a row that failed nothing is known: it leads nowhere
        usable = np.isfinite(told.violations)
        new = [i for i, k in enumerate(keys) if usable[i] and k not in known]
        told = told.take(np.array(new, dtype=np.int64))
        if len(told) == 0:
            return
        joined = told if self._front is None else self._front.join(told)
        before = self._stage if self._front is not None else self._stage[:0]
        stage = np.concatenate([before, np.zeros(len(told), dtype=np.int8)])
        best: Index = np.flatnonzero(ranks(joined.values, joined.violations) == 0)[-_LARGEST:]
        self._front, self._stage = joined.take(best), stage[best]
        if _CENTRE not in self._stage:
            self._queue = self._empty()  # better rows were found: their neighbours come first

    def _empty(self) -> Codes:
        return np.zeros((0, len(self.space)), dtype=self.space.dtype)

    def state(self) -> dict[str, Any]:
        """The front, what is to be asked, everything seen and the generator, as plain JSON."""
        return {
            "strategy": self.name,
            "undrawn": self._undrawn,
            "front": None if self._front is None else self._front.to_json(),
            "stage": pack(self._stage),
            "queue": pack(self._queue),
            "seen": self._seen.to_json(),
            "rng": self.rng.bit_generator.state,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from `state()`."""
        self.require_own(state)
        self._undrawn = state["undrawn"]
        front = state["front"]
        self._front = None if front is None else Population.from_json(front)
        self._stage, self._queue = unpack(state["stage"]), unpack(state["queue"])
        self._seen = Seen.from_json(self.space, state["seen"])
        self.rng.bit_generator.state = state["rng"]
