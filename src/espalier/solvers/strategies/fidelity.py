"""What multi-fidelity strategies share: candidates that climb levels, one row a level."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np

from espalier.solvers.strategies.fresh import Seen
from espalier.solvers.strategies.levels import Levels
from espalier.solvers.strategies.results import Results
from espalier.solvers.strategies.strategy import Array, Codes, Strategy
from espalier.space import Space

Job = tuple[int, int]  # the number of a candidate, and the level it is to be evaluated at


class MultiFidelity(Strategy):
    """Asks new candidates at a low level and the best of them again at higher ones.

    The space has an ordinal or integer decision `fidelity` (`levels.extended` adds one); where it
    has none there is one level, and nobody is promoted. A row is asked at any batch size, results
    come in any order, and an ask never waits: where a promotion has to, a new candidate is begun.
    Who failed or breaks a limit is never promoted. A row that was refused before anything was paid
    for it does not count towards the `1 / eta` that are promoted. When the space has no new
    candidates, the best of those left go on to the top: so the last ask comes when every candidate
    is there, or was not worth it.
    """

    def __init__(self, space: Space, seed: int = 0, fidelity: str = "epochs", eta: int = 3) -> None:
        super().__init__(space, seed)
        self.eta = eta
        self.levels = Levels(space, fidelity, eta)
        self.results = Results(self.levels.inner, len(self.levels))
        self._seen = Seen(self.levels.inner)

    @abstractmethod
    def _next(self) -> Job | None:
        """The next row to ask; None when there is nothing left to promote or to begin."""

    @abstractmethod
    def _own_state(self) -> dict[str, Any]:
        """What a subclass remembers beside the results, as plain JSON."""

    @abstractmethod
    def _own_load(self, state: dict[str, Any]) -> None:
        """Goes on from `_own_state()`."""

    def _propose(self, n: int) -> Codes:
        """n candidates of the inner space that need not be new; random by default."""
        return self.levels.inner.sample(n, self.rng)

    def ask(self, n: int) -> Codes:
        """The next n rows; fewer when the space has no others, or all that is left is running."""
        jobs: list[Job] = []
        while len(jobs) < n:
            job = self._next() or self._left_over()
            if job is None:
                break
            number, level = job
            self.results.asked[level].add(number)
            jobs.append(job)
        parts = [np.zeros((0, len(self.space)), dtype=self.space.dtype)]
        parts += [self.levels.at(self.results.codes([i]), level) for i, level in jobs]
        return np.concatenate(parts)

    def _new(self) -> int | None:
        """The number of a new candidate, if there is one."""
        codes = self._seen.fresh(1, self.rng, self._propose)
        return self.results.number(codes)[0] if len(codes) else None

    def _left_over(self) -> Job | None:
        for level in range(self.levels.top - 1, -1, -1):
            for number in self.results.best(level):
                if number not in self.results.asked[level + 1]:
                    return number, level + 1
        return None

    def tell(self, codes: Codes, values: Array, violations: Array) -> None:
        """The results of rows, in any order; rows of levels that are not used are ignored."""
        if len(codes) == 0:
            return
        codes = np.asarray(codes, dtype=self.space.dtype)
        values = np.asarray(values, dtype=float).reshape(len(codes), -1)
        broken = np.asarray(violations, dtype=float).reshape(len(codes))
        levels = self.levels.of(codes)
        used = np.flatnonzero(levels >= 0)
        inner = self.levels.strip(codes[used])
        self._seen.add(inner)
        for i, number in zip(used.tolist(), self.results.number(inner), strict=True):
            self.results.tell(int(levels[i]), number, values[i], float(broken[i]))

    def state(self) -> dict[str, Any]:
        """Candidates, their results, what goes on, and the generator, as plain JSON."""
        return {
            "strategy": self.name,
            "results": self.results.to_json(),
            "own": self._own_state(),
            "rng": self.rng.bit_generator.state,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from `state()`."""
        self.require_own(state)
        self.results = Results.from_json(self.levels.inner, state["results"])
        self._seen = Seen(self.levels.inner)
        self._seen.add(self.results.codes(list(range(len(self.results.rows)))))
        self._own_load(state["own"])
        self.rng.bit_generator.state = state["rng"]
