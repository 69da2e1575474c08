"""Monte Carlo tree search: decisions one after the other, the promising prefixes more often.

UCT (Kocsis & Szepesvari, 2006) over the decisions of a space, as in Negrinho & Gordon,
"DeepArchitect: Automatically Designing and Training Deep Architectures" (2017),
https://arxiv.org/abs/1704.08792, with its bisection of long lists of options. What differs: a
value counts as its place among all values, rows that are being evaluated count as visits without
a reward (virtual loss; Chaslot et al., 2008), and behind the tree options are drawn by how well
they did anywhere (move averages; Finnsson & Bjornsson, 2008), with `uniform` at random.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from espalier.errors import EspalierError
from espalier.solvers.strategies.fresh import Seen
from espalier.solvers.strategies.merit import merit, weights
from espalier.solvers.strategies.moves import Moves
from espalier.solvers.strategies.population import Index, Population, pack, unpack
from espalier.solvers.strategies.strategy import Array, Codes, Strategy
from espalier.space import Space

_GREED = 8.0  # a row of the best place is e^8 times as likely to be followed as one of the worst
_FREE = 0.2  # share of decisions that are drawn evenly all the same


class MCTS(Strategy):
    """Descends from the first decision by value + `explore` sqrt(ln N / n), and where no row has
    been, goes on by `rollout`: "average" or "uniform".

    With `bisect`, an ordinal, integer or real decision is halved until one option is left, so that
    near options share what is known. The tree is not stored: a node is a prefix, and its
    statistics are those of the rows that begin with it.
    """

    name = "mcts"
    learns = True

    def __init__(
        self,
        space: Space,
        seed: int = 0,
        explore: float = 0.3,
        bisect: bool = True,
        rollout: str = "average",
    ) -> None:
        super().__init__(space, seed)
        if rollout not in ("average", "uniform"):
            raise EspalierError(f"a rollout is 'average' or 'uniform', got {rollout!r}")
        self.explore, self.rollout = explore, rollout
        self.moves = Moves(space, bisect)
        self._seen = Seen(space)
        self._told: Population | None = None
        self._waiting = self._empty()  # asked and not told
        self._made = [self.moves.of(self._waiting)] * 2  # the moves of told and of waiting rows

    def ask(self, n: int) -> Codes:
        """The next n candidates as codes; fewer when the space has no others."""
        reward = np.zeros(0)
        if self._told is not None:
            reward = merit(self._told, weights(self._told.values.shape[1], self.rng))
        codes = self._seen.fresh(n, self.rng, _Descents(self, reward).rows)
        self._waiting = np.concatenate([self._waiting, codes])
        self._made[1] = np.concatenate([self._made[1], self.moves.of(codes)])
        return codes

    def tell(self, codes: Codes, values: Array, violations: Array) -> None:
        """The rows' values are backed up: they count in every prefix from now on."""
        if len(codes) == 0:
            return
        told = Population.told(self.space.canonical(codes), values, violations)
        known = set() if self._told is None else set(self.space.keys(self._told.codes).tolist())
        keys = self.space.keys(told.codes).tolist()
        new = [i for i, k in enumerate(keys) if k not in known and k not in keys[:i]]
        told = told.take(np.array(new, dtype=np.int64))
        self._seen.add(told.codes)
        self._told = told if self._told is None else self._told.join(told)
        self._made[0] = np.concatenate([self._made[0], self.moves.of(told.codes)])
        gone = set(keys)
        waits = [k not in gone for k in self.space.keys(self._waiting).tolist()]
        rows = np.flatnonzero(waits)
        self._waiting, self._made[1] = self._waiting[rows], self._made[1][rows]

    def _empty(self) -> Codes:
        return np.zeros((0, len(self.space)), dtype=self.space.dtype)

    def state(self) -> dict[str, Any]:
        """What was told, what is waited for, everything seen and the generator, as plain JSON."""
        return {
            "strategy": self.name,
            "told": None if self._told is None else self._told.to_json(),
            "waiting": pack(self._waiting),
            "seen": self._seen.to_json(),
            "rng": self.rng.bit_generator.state,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from `state()`."""
        self.require_own(state)
        told = state["told"]
        self._told = None if told is None else Population.from_json(told)
        self._waiting = unpack(state["waiting"])
        known = self._empty() if self._told is None else self._told.codes
        self._made = [self.moves.of(known), self.moves.of(self._waiting)]
        self._seen = Seen.from_json(self.space, state["seen"])
        self.rng.bit_generator.state = state["rng"]


class _Descents:
    """The descents of one ask. Each counts at once as a visit, so that they spread."""

    def __init__(self, strategy: MCTS, reward: Array) -> None:
        self.space, self.moves, self.rng = strategy.space, strategy.moves, strategy.rng
        self.explore = strategy.explore
        self.told = strategy._told
        self.taken = np.concatenate(strategy._made)
        # 0 for what is waited for: a virtual loss
        self.reward = np.concatenate([reward, np.zeros(len(self.taken) - len(reward))])
        self.likely: Array | None = None
        if strategy.rollout == "average" and self.told is not None:
            likely = np.cumsum(np.exp(_GREED * (reward - 1.0)))
            self.likely = likely / likely[-1]

    def rows(self, n: int) -> Codes:
        """n rows; they need not be new."""
        return np.concatenate([self._row() for _ in range(n)])

    def _row(self) -> Codes:
        width = len(self.space)
        follow = np.full(width, -1)  # which told row a decision behind the tree follows
        if self.likely is not None:
            follow = np.searchsorted(self.likely, self.rng.random(width))
            follow[self.rng.random(width) < _FREE] = -1
        free = self.rng.random(width)
        row = np.zeros((1, width), dtype=self.space.dtype)
        active = np.zeros((1, width), dtype=np.bool_)
        here: Index = np.arange(len(self.taken))
        for j in self.moves.turns.order:
            if self.moves.turns.conditional(j):
                active[:, j] = self.moves.turns.active(j, row, active)
                if not active[0, j]:
                    continue
            active[0, j] = True
            low, high, here = self._descend(j, here)
            row[0, j] = self.moves.code(j, self._spot(j, low, high, int(follow[j]), free[j]))
        row = self.space.canonical(row)
        if self.space.constraints:
            row = self.space.repair(row, self.rng)
        self.taken = np.concatenate([self.taken, self.moves.of(row)])
        self.reward = np.append(self.reward, 0.0)
        return row

    def _descend(self, j: int, here: Index) -> tuple[float, float, Index]:
        """The interval of decision j that the tree leads to, and the rows that are in it.

        Where no row has been, the interval is what is left of the decision.
        """
        low, high = 0.0, self.moves.width(j)
        for level in self.moves.levels[j]:
            if len(here) == 0 or (self.moves.halved[j] and self.moves.ends(j, low, high)):
                break
            made = self.taken[here, level]
            move = self._pick(made, self.reward[here], self.moves.branches[level])
            here = here[made == move]
            if not self.moves.halved[j]:
                return float(move), move + 1.0, here
            middle = self.moves.middle(j, low, high)
            low, high = (low, middle) if move == 0 else (middle, high)
        return low, high, here

    def _pick(self, made: Index, reward: Array, branches: int) -> int:
        """The move by upper confidence bound; one that was never made comes first."""
        if branches == 1:
            return 0
        visits = np.bincount(made, minlength=branches)
        never = np.flatnonzero(visits == 0)
        if len(never):
            return int(never[self.rng.integers(len(never))])
        value = np.bincount(made, weights=reward, minlength=branches) / visits
        bound = value + self.explore * np.sqrt(np.log(len(made)) / visits)
        return int(bound.argmax())

    def _spot(self, j: int, low: float, high: float, follow: int, free: float) -> float:
        """A place in the interval: that of the row to follow where it is in there, else any."""
        if self.told is not None and follow >= 0 and self._active(follow, j):
            spot = float(self.moves.spot(j, self.told.codes[follow, j : j + 1])[0])
            if self.moves.fine(j):  # near it: two rows hardly ever share a real number
                spot = (math.floor(spot * self.moves.fine(j)) + free) / self.moves.fine(j)
            if low <= spot < high:
                return spot
        return low + (high - low) * free

    def _active(self, row: int, j: int) -> bool:
        return bool(self.taken[row, self.moves.levels[j][0]] >= 0)
