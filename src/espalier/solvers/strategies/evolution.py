"""Regularised evolution: the population forgets its oldest, not its worst.

Real, Aggarwal, Huang & Le, "Regularized Evolution for Image Classifier Architecture Search"
(AAAI 2019), https://arxiv.org/abs/1802.01548. What differs: rows that break a limit never push out
rows that keep it, and with several objectives the tournament is won by rank and crowding.
"""

from __future__ import annotations

from espalier.errors import EspalierError
from espalier.solvers.strategies.loop import EvolutionLoop
from espalier.solvers.strategies.slots import Mutate, Tournament, Youngest
from espalier.space import Space


class Evolution(EvolutionLoop):
    """Tournament of `sample` rows, one mutated child each, the youngest `population` stay."""

    name = "evolution"

    def __init__(
        self, space: Space, seed: int = 0, population: int | None = None, sample: int = 5
    ) -> None:
        if sample < 1:
            raise EspalierError(f"a tournament has at least 1 entrant, got sample={sample}")
        super().__init__(space, seed, Tournament(sample), Mutate(), Youngest(), population)
