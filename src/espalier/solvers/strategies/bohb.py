"""BOHB: Hyperband whose candidates are drawn where good ones are denser than bad ones.

Falkner, Klein & Hutter, "BOHB: Robust and Efficient Hyperparameter Optimization at Scale" (ICML
2018), https://arxiv.org/abs/1807.01774. What differs: good and bad are told apart by constraint
domination, so that limits and several objectives count, and ordered decisions have their own
kernel.
"""

from __future__ import annotations

import numpy as np

from espalier.errors import EspalierError
from espalier.solvers.strategies.brackets import Brackets
from espalier.solvers.strategies.density import Density
from espalier.solvers.strategies.halving import hyperband_plan
from espalier.solvers.strategies.results import best_first
from espalier.solvers.strategies.strategy import Codes
from espalier.space import Space


class BOHB(Brackets):
    """Of `draws` rows near good ones, that with the largest ratio of the two densities.

    The densities are those of the best `good` share and of the others, at the highest level where
    enough rows are known (decisions + 3). A share `chance` of the candidates stays random. Where
    the space has no fidelity it is this model alone.
    """

    name = "bohb"
    learns = True

    def __init__(
        self,
        space: Space,
        seed: int = 0,
        fidelity: str = "epochs",
        eta: int = 3,
        good: float = 0.15,
        chance: float = 1 / 3,
        draws: int = 64,
    ) -> None:
        super().__init__(space, seed, fidelity, eta)
        if not 0 < good < 1 or not 0 <= chance <= 1 or draws < 1:
            raise EspalierError(
                "good is a share between 0 and 1, chance one from 0 to 1, draws at least 1, "
                f"got good={good}, chance={chance}, draws={draws}"
            )
        self.good, self.chance, self.draws = good, chance, draws
        self._model: tuple[Density, Density] | None = None
        self._known = (-1, 0)  # the level of the model, and how many rows it had

    def plan(self, number: int) -> tuple[int, int]:
        """As Hyperband."""
        return hyperband_plan(number, len(self.levels), self.eta)

    def _propose(self, n: int) -> Codes:
        space = self.levels.inner
        densities = self._densities()
        if densities is None or self.rng.random() < self.chance:
            return space.sample(n, self.rng)
        good, bad = densities
        drawn = space.repair(good.draw(max(self.draws, n), self.rng), self.rng)
        drawn = drawn[self._seen.new_rows(drawn)]
        best = np.argsort(bad.log(drawn) - good.log(drawn), kind="stable")
        return drawn[best[:n]]

    def _densities(self) -> tuple[Density, Density] | None:
        """Of good and of bad rows, at the highest level that has enough; None before any has."""
        least = len(self.levels.inner) + 1
        enough = [k for k, told in enumerate(self.results.told) if len(told) >= least + 2]
        if not enough:
            return None
        level = enough[-1]
        now = (level, len(self.results.told[level]))
        if self._model is None or self._known != now:
            _, people = self.results.population(level)
            order = best_first(people)
            count = max(least, int(self.good * len(order)))
            others = max(least, len(order) - count)
            self._known = now
            self._model = (
                Density(self.levels.inner, people.codes[order[:count]]),
                Density(self.levels.inner, people.codes[order[-others:]]),
            )
        return self._model
