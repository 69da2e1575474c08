"""REINFORCE: a recurrent controller writes rows, decision by decision, and is rewarded for good ones.

Zoph & Le, "Neural Architecture Search with Reinforcement Learning" (ICLR 2017),
https://arxiv.org/abs/1611.01578: an LSTM, policy gradient (Williams, 1992) with a moving-average
baseline; the entropy bonus is that of Mnih et al., 2016. What differs: the reward is a row's place
among those before it, so that no scale needs tuning; limits that are broken put a row behind all
that keep them; a row that was asked before is drawn again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from espalier.errors import EspalierError
from espalier.solvers.strategies.bins import Bins
from espalier.solvers.strategies.fresh import Seen
from espalier.solvers.strategies.merit import merit, weights
from espalier.solvers.strategies.population import Population
from espalier.solvers.strategies.replayed import Replayed
from espalier.solvers.strategies.strategy import Array, Codes
from espalier.space import Space

if TYPE_CHECKING:
    from espalier.solvers.strategies.controller import Controller

_DRAWS = 16  # rows written at once: the sampler's cost hardly hangs on their number
_HEAT = 1.3  # by which the odds are flattened before rows are written again
_MEMORY = 500  # rows that a reward compares with
_DECAY = 0.95  # of the baseline


class Reinforce(Replayed):
    """One Adam step of the controller for every tell; `hidden` units, `entropy` times the bonus.

    A decision of more than `levels` options, or a real one, is written as one of `levels` equal
    parts of its range, and drawn evenly within it. Each tell weighs several objectives at random
    (see `merit`). Runs on one thread; needs no GPU.
    """

    name = "reinforce"
    learns = True

    def __init__(
        self,
        space: Space,
        seed: int = 0,
        rate: float = 0.02,
        entropy: float = 0.01,
        hidden: int = 32,
        levels: int = 16,
    ) -> None:
        super().__init__(space, seed)
        if levels < 2 or hidden < 1 or rate <= 0:
            raise EspalierError(
                "reinforce needs levels of at least 2, hidden units and a rate above 0, "
                f"got levels={levels}, hidden={hidden}, rate={rate}"
            )
        self.rate, self.entropy, self.hidden, self.levels = rate, entropy, hidden, levels

    def _begin(self) -> None:
        from espalier.solvers.strategies.controller import Controller

        self._rng = np.random.default_rng(self.seed)
        self._bins = Bins(self.space, self.levels)
        self._controller: Controller = Controller(self._bins, self.hidden, self.rate, self.seed)
        self._seen = Seen(self.space)
        self._told: Population | None = None
        self._baseline = 0.5

    def _ask(self, n: int) -> Codes:
        heat = 1.0

        def written(k: int) -> Codes:
            """Rows by the controller, in the order written; they need not be new."""
            nonlocal heat
            codes = self._controller.write(max(k, _DRAWS), self._rng, heat)
            heat *= _HEAT  # where it only repeats itself, it strays a little further each time
            return self.space.repair(codes, self._rng) if self.space.constraints else codes

        return self._seen.fresh(n, self._rng, written)

    def _tell(self, codes: Codes, values: Array, violations: Array) -> None:
        self._seen.add(codes)
        codes = self.space.canonical(codes)
        told = Population.told(codes, values, violations)
        self._told = told if self._told is None else self._told.join(told)
        self._told = self._told.take(np.arange(len(self._told))[-max(_MEMORY, len(codes)) :])
        reward = merit(self._told, weights(values.shape[1], self._rng))[-len(codes) :]
        choices, made = self._bins.of(codes)
        self._controller.learn(choices, made, reward - self._baseline, self.entropy)
        share = _DECAY ** len(codes)
        self._baseline = share * self._baseline + (1 - share) * float(reward.mean())
