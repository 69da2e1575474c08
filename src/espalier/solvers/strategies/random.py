"""Random search: the baseline that every other strategy must beat (Li & Talwalkar, 2019)."""

from __future__ import annotations

from typing import Any

from espalier.solvers.strategies.fresh import Seen
from espalier.solvers.strategies.strategy import Array, Codes, Strategy
from espalier.space import Space


class Random(Strategy):
    """Draws valid candidates at random, none twice. What it is told changes nothing."""

    name = "random"
    learns = False

    def __init__(self, space: Space, seed: int = 0) -> None:
        super().__init__(space, seed)
        self._seen = Seen(space)

    def ask(self, n: int) -> Codes:
        """n random candidates as codes; fewer when the space has no others."""
        return self._seen.fresh(n, self.rng)

    def tell(self, codes: Codes, values: Array, violations: Array) -> None:
        """Remembers that the rows are known."""
        if len(codes):
            self._seen.add(codes)

    def state(self) -> dict[str, Any]:
        """Everything drawn, and the generator, as plain JSON."""
        return {
            "strategy": self.name,
            "seen": self._seen.to_json(),
            "rng": self.rng.bit_generator.state,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from `state()`."""
        self.require_own(state)
        self._seen = Seen.from_json(self.space, state["seen"])
        self.rng.bit_generator.state = state["rng"]
