"""Successive halving and Hyperband: many candidates for few epochs, few for many.

Jamieson & Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization"
(AISTATS 2016), https://arxiv.org/abs/1502.07943; Li, Jamieson, DeSalvo, Rostamizadeh & Talwalkar,
"Hyperband: A Novel Bandit-Based Approach to Hyperparameter Optimization" (JMLR 2018),
https://arxiv.org/abs/1603.06560. What differs: where a rung waits for results the next bracket
begins, and several objectives are ordered by non-domination and crowding.
"""

from __future__ import annotations

from espalier.errors import EspalierError
from espalier.solvers.strategies.brackets import Brackets
from espalier.space import Space


class SuccessiveHalving(Brackets):
    """Brackets of `candidates` that all begin at the lowest level, again and again.

    Without `candidates` there are as many as leave one for the top: eta to the number of
    promotions.
    """

    name = "halving"
    learns = False

    def __init__(
        self,
        space: Space,
        seed: int = 0,
        fidelity: str = "epochs",
        eta: int = 3,
        candidates: int | None = None,
    ) -> None:
        super().__init__(space, seed, fidelity, eta)
        if candidates is not None and candidates < 1:
            raise EspalierError(f"a bracket has at least 1 candidate, got {candidates}")
        self.candidates = candidates or eta**self.levels.top

    def plan(self, number: int) -> tuple[int, int]:
        """The same for every bracket."""
        return self.candidates, 0


def hyperband_plan(number: int, levels: int, eta: int) -> tuple[int, int]:
    """Candidates and first level of a bracket of Hyperband, which all cost about the same.

    The first begins at the lowest level, the next one level higher, and so on in turns.
    """
    first = number % levels
    steps = levels - 1 - first  # promotions up to the top
    return -(-levels * eta**steps // (steps + 1)), first


class Hyperband(Brackets):
    """Successive halving at every trade of candidates against epochs, in turns."""

    name = "hyperband"
    learns = False

    def plan(self, number: int) -> tuple[int, int]:
        """ceil(levels / (s + 1) * eta^s) candidates for s promotions."""
        return hyperband_plan(number, len(self.levels), self.eta)
