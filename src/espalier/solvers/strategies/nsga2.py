"""NSGA-II: a front of trade-offs by non-domination and crowding, under limits.

Deb, Pratap, Agarwal & Meyarivan, "A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II"
(IEEE Trans. Evolutionary Computation, 2002). What differs: discrete decisions are crossed and
mutated by the space's own operators, no candidate is proposed twice, and two corners of the space
are in the first population.
"""

from __future__ import annotations

from espalier.solvers.strategies.loop import EvolutionLoop
from espalier.solvers.strategies.slots import Best, CrossAndMutate, Tournament
from espalier.space import Space


class NSGA2(EvolutionLoop):
    """Crowded binary tournament, crossover and mutation, the best of parents and children stay."""

    name = "nsga2"

    def __init__(
        self,
        space: Space,
        seed: int = 0,
        population: int | None = None,
        cross: float = 0.9,
        rate: float | None = None,
    ) -> None:
        super().__init__(
            space, seed, Tournament(2), CrossAndMutate(cross, rate), Best(), population
        )
