"""The evolution loop: a population, and four slots that decide what happens to it."""

from __future__ import annotations

from typing import Any

import numpy as np

from espalier.errors import EspalierError
from espalier.solvers.strategies.fresh import Seen
from espalier.solvers.strategies.population import Population
from espalier.solvers.strategies.slots import Corners, Init, Select, Survive, Vary
from espalier.solvers.strategies.strategy import Array, Codes, Strategy
from espalier.space import Space

_SMALL_BATCH = 8
_DEFAULT_POPULATION = 20


class EvolutionLoop(Strategy):
    """Evolution in any batch size: `init` makes the first rows, every later row is a child.

    Without `population` it is the size of the first batch, or 20 where that is below 8.
    """

    learns = True

    def __init__(
        self,
        space: Space,
        seed: int,
        select: Select,
        vary: Vary,
        survive: Survive,
        population: int | None = None,
        init: Init | None = None,
    ) -> None:
        super().__init__(space, seed)
        if population is not None and population < 2:
            raise EspalierError(f"a population has at least 2 members, got {population}")
        self.init = init or Corners()
        self.select, self.vary, self.survive = select, vary, survive
        self.size = population
        self.members: Population | None = None
        self._seen = Seen(space)
        self._asked = 0

    def ask(self, n: int) -> Codes:
        """The next n candidates as codes; fewer when the space has no others."""
        if self.size is None:
            self.size = n if n >= _SMALL_BATCH else _DEFAULT_POPULATION
        first = n  # while nothing was told, there are no parents
        if self.members is not None:
            first = min(n, self.init.left(self.size, self._asked, self.members))
        if first == n:
            codes = self._first(n)
        elif first == 0:
            codes = self._children(n)
        else:
            codes = np.concatenate([self._first(first), self._children(n - first)])
        self._asked += len(codes)
        return codes

    def _first(self, n: int) -> Codes:
        asked = self._asked
        return self._seen.fresh(n, self.rng, lambda k: self.init(self.space, k, asked, self.rng))

    def _children(self, n: int) -> Codes:
        members = self.members

        def propose(k: int) -> Codes:
            assert members is not None
            # more than needed, because some were seen before
            children = self.vary(self.space, members, self.select, k + k // 2 + 1, self.rng)
            return self.space.canonical(children)

        return self._seen.fresh(n, self.rng, propose)

    def tell(self, codes: Codes, values: Array, violations: Array) -> None:
        """Adds rows to the population and lets `survive` decide; a row told before is ignored."""
        if len(codes) == 0:
            return
        told = Population.told(codes, values, violations)
        self._seen.add(told.codes)
        joined = told if self.members is None else self.members.join(told)
        first: dict[Any, int] = {}
        for i, key in enumerate(self.space.keys(joined.codes).tolist()):
            first.setdefault(key, i)
        if len(first) < len(joined):
            joined = joined.take(np.array(list(first.values()), dtype=np.int64))
        size = self.size or _DEFAULT_POPULATION
        self.members = joined.take(self.survive(joined, size))

    def state(self) -> dict[str, Any]:
        """Population, everything seen, and the generator, as plain JSON."""
        return {
            "strategy": self.name,
            "size": self.size,
            "asked": self._asked,
            "members": None if self.members is None else self.members.to_json(),
            "seen": self._seen.to_json(),
            "rng": self.rng.bit_generator.state,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from `state()`."""
        self.require_own(state)
        self.size, self._asked = state["size"], state["asked"]
        members = state["members"]
        self.members = None if members is None else Population.from_json(members)
        self._seen = Seen.from_json(self.space, state["seen"])
        self.rng.bit_generator.state = state["rng"]
