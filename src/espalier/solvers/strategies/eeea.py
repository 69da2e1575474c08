"""Constrained evolution with threshold initialisation: the first population is cheap already.

EEEA-Net: Termritthikun, Jamtsho, Ieamsaard, Muneesawang & Lee, "EEEA-Net: An Early Exit
Evolutionary Neural Architecture Search" (Engineering Applications of AI, 2021),
https://arxiv.org/abs/2108.06156. What differs: where a price is not given, the limits that rows
are told to break take its place, and redrawing ends after some tries.
"""

from __future__ import annotations

from espalier.errors import EspalierError
from espalier.solvers.strategies.loop import EvolutionLoop
from espalier.solvers.strategies.slots import Below, Best, CrossAndMutate, Kept, Price, Tournament
from espalier.space import Space


class EEEA(EvolutionLoop):
    """NSGA-II whose first rows are redrawn until `price(codes)` is at most `threshold`.

    A strategy never sees costs: `price` maps codes `(n, d)` to numbers `(n,)`, and must be cheap
    (parameters, say). Without it, first rows that break a limit are replaced by others until
    `population` rows keep every limit, at most 4 times as many asks.
    """

    name = "eeea"

    def __init__(
        self,
        space: Space,
        seed: int = 0,
        population: int | None = None,
        price: Price | None = None,
        threshold: float | None = None,
        cross: float = 0.9,
        rate: float | None = None,
    ) -> None:
        if (price is None) != (threshold is None):
            raise EspalierError(
                "eeea takes a price with its threshold, got one of them: give both, or neither"
            )
        init: Below | Kept = Kept()
        if price is not None and threshold is not None:
            init = Below(price, float(threshold))
        vary = CrossAndMutate(cross, rate)
        super().__init__(space, seed, Tournament(2), vary, Best(), population, init)
