"""Where a guided search takes its candidates from: the whole space, or children of the best.

A slot is a frozen dataclass with its numbers; `begin` makes the source that a search works with.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.errors import EspalierError, SpaceError
from espalier.solvers.strategies.fresh import Seen
from espalier.solvers.strategies.population import pack, unpack
from espalier.space import Space

Codes = NDArray[Any]
Array = NDArray[np.float64]
Index = NDArray[np.int64]
Features = Callable[[Codes], Array]
Judge = Callable[[Array], Array]  # features to scores, the highest is best


_EVERY = 4  # fits between two looks at the whole space


class Source(ABC):
    """Candidates that were not proposed yet, with their features."""

    @abstractmethod
    def pool(
        self, parents: Codes, seen: Seen, judge: Judge, n: int, rng: np.random.Generator
    ) -> tuple[Codes, Array]:
        """New valid rows and their features; no fewer than n where the space has them.

        `parents` are the best rows told, best first; `judge` scores features generously.
        """

    def taken(self, codes: Codes) -> None:
        """These rows were proposed or told."""
        del codes

    def refitted(self) -> None:
        """The regressors have learnt anew: what `judge` said before is out of date."""
        return None

    def state(self) -> dict[str, Any]:
        """Plain JSON."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from `state`."""
        del state


class Proposals(ABC):
    """Makes sources."""

    @abstractmethod
    def begin(self, space: Space, features: Features) -> Source:
        """A source of this kind for one search."""


@dataclass(frozen=True)
class Everything(Proposals):
    """All rows of a space that can be listed, up to `limit`.

    After every fourth fit all are scored, after the others the best `wide` of them; the best `keep`
    are looked at until the next fit. Rows of equal features are one; the first of them in the
    space's order stands for the others.
    """

    limit: int = 50_000
    wide: int = 2000
    keep: int = 200

    def begin(self, space: Space, features: Features) -> Source:
        """Lists the space. Errors: `SpaceError` where it has more rows, or a real decision."""
        return _Listing(space.enumerate(self.limit), space, features, self)


@dataclass(frozen=True)
class Mutations(Proposals):
    """Children of the best rows told, and random rows; then children of the best of those.

    - `count`: rows a round, of which `random` are drawn anew and a quarter crossed.
    - `parents`: how many of the best rows told have children.
    - `rounds`: each next round mutates the best of the one before.
    """

    count: int = 200
    random: float = 0.2
    parents: int = 10
    rounds: int = 3

    def begin(self, space: Space, features: Features) -> Source:
        """Holds nothing but the space."""
        return _Children(space, features, self)


@dataclass(frozen=True)
class Auto(Proposals):
    """Everything where the space can be listed up to `limit` rows, else mutations."""

    limit: int = 50_000

    def begin(self, space: Space, features: Features) -> Source:
        """The source that fits the space."""
        if space.size <= self.limit or (space.constraints and space.size < math.inf):
            with suppress(SpaceError):  # constraints may leave few rows of a large space
                return Everything(self.limit).begin(space, features)
        return Mutations().begin(space, features)


PROPOSALS: dict[str, Proposals] = {
    "auto": Auto(),
    "everything": Everything(),
    "mutations": Mutations(),
}


class _Listing(Source):
    def __init__(self, codes: Codes, space: Space, features: Features, numbers: Everything) -> None:
        if len(codes) == 0:
            raise EspalierError("the space has no valid row: loosen its constraints")
        x = np.ascontiguousarray(features(codes), dtype=np.float64)
        lines = np.ascontiguousarray(x).view(np.dtype((np.void, x.shape[1] * x.itemsize)))[:, 0]
        _, first, of = np.unique(lines, return_index=True, return_inverse=True)
        order = np.argsort(of, kind="stable")  # rows of equal features side by side
        self.space, self.codes, self.of = space, codes[order], of[order]
        self.wide, self.keep = numbers.wide, numbers.keep
        self.x = x[first]
        self._place = {key: i for i, key in enumerate(space.keys(self.codes).tolist())}
        self._taken = np.zeros(len(codes), dtype=np.bool_)
        self._kept: Index | None = None  # classes looked at until the next fit
        self._wide: Index | None = None  # classes scored after it
        self._fits = 0

    def pool(
        self, parents: Codes, seen: Seen, judge: Judge, n: int, rng: np.random.Generator
    ) -> tuple[Codes, Array]:
        """The kept rows that are new; with n above a quarter of them, the whole space."""
        free = np.flatnonzero(~self._taken)
        classes, first = np.unique(self.of[free], return_index=True)
        rows = free[first]
        if len(rows) > self.keep:
            if self._kept is None:
                self._kept = self._best(classes, judge)
            some = np.isin(classes, self._kept, assume_unique=True)
            if some.sum() >= max(4 * n, self.keep // 4):
                rows, classes = rows[some], classes[some]
        if len(rows) < n:  # several of equal features
            rows = free
            classes = self.of[free]
        return self.codes[rows], self.x[classes]

    def _best(self, classes: Index, judge: Judge) -> Index:
        """Whom to keep; now and then also chooses whom to score the next times."""
        some = classes
        if self._wide is not None and self._fits % _EVERY:
            some = np.intersect1d(classes, self._wide, assume_unique=True)
        order = some[np.argsort(-judge(self.x[some]), kind="stable")]
        if len(some) == len(classes):
            self._wide = np.sort(order[: self.wide])
        self._fits += 1
        return np.asarray(np.sort(order[: self.keep]))

    def taken(self, codes: Codes) -> None:
        """Never given again."""
        for key in self.space.keys(codes).tolist():
            if key in self._place:
                self._taken[self._place[key]] = True

    def refitted(self) -> None:
        """Scores again at the next pool."""
        self._kept = None

    def state(self) -> dict[str, Any]:
        """Which were kept."""
        kept, wide = (None if v is None else pack(v) for v in (self._kept, self._wide))
        return {"kept": kept, "wide": wide, "fits": self._fits}

    def load(self, state: dict[str, Any]) -> None:
        """Keeps the same."""
        self._kept = None if state["kept"] is None else unpack(state["kept"])
        self._wide = None if state["wide"] is None else unpack(state["wide"])
        self._fits = int(state["fits"])


class _Children(Source):
    def __init__(self, space: Space, features: Features, numbers: Mutations) -> None:
        self.space, self.features, self.numbers = space, features, numbers

    def pool(
        self, parents: Codes, seen: Seen, judge: Judge, n: int, rng: np.random.Generator
    ) -> tuple[Codes, Array]:
        """Rounds of children, each of the best so far; of all, the best `count` or 2 n."""
        count = max(self.numbers.count, 2 * n)
        best = parents[: self.numbers.parents]
        rows, x, score = best[:0], np.zeros((0, 0)), np.zeros(0)
        for _ in range(self.numbers.rounds):
            found = self._new(self._round(best, count, rng), rows, seen)
            if len(found) == 0:
                continue
            more = np.ascontiguousarray(self.features(found), dtype=np.float64)
            x = np.concatenate([x, more]) if len(rows) else more
            rows, score = np.concatenate([rows, found]), np.concatenate([score, judge(more)])
            order = np.argsort(-score, kind="stable")[:count]
            rows, x, score = rows[order], x[order], score[order]
            best = rows[: self.numbers.parents]
        return rows, x

    def _round(self, best: Codes, count: int, rng: np.random.Generator) -> Codes:
        drawn = int(self.numbers.random * count)
        crossed = (count - drawn) // 4
        space = self.space
        parts = [space.sample(drawn, rng)]
        mothers, fathers = (best[rng.integers(0, len(best), size=crossed)] for _ in range(2))
        parts.append(space.mutate(space.cross(mothers, fathers, rng), rng))
        some = best[rng.integers(0, len(best), size=count - drawn - crossed)]
        parts.append(space.mutate(some, rng))
        return space.canonical(np.concatenate(parts))

    def _new(self, codes: Codes, rows: Codes, seen: Seen) -> Codes:
        """The rows that are neither seen nor in `rows`."""
        codes = seen.new(codes)
        if len(rows) == 0 or len(codes) == 0:
            return codes
        return codes[~np.isin(self.space.keys(codes), self.space.keys(rows))]
