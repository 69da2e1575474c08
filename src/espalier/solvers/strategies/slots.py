"""What evolution is made of: how it starts, how parents are chosen and vary, and who survives.

A slot is a frozen dataclass with its numbers; an evolutionary strategy is a choice for each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.solvers.strategies.population import Index, Population
from espalier.space import Space

Codes = NDArray[Any]
Price = Callable[[Codes], NDArray[np.float64]]

_DRAWS = 64  # times as many rows as wanted, before the cheapest so far must do


class Init(ABC):
    """Makes the first population."""

    @abstractmethod
    def __call__(self, space: Space, n: int, asked: int, rng: np.random.Generator) -> Codes:
        """About n codes; they need not be new. `asked` rows were asked before."""

    @abstractmethod
    def left(self, size: int, asked: int, members: Population) -> int:
        """How many rows of the first population are still to be asked, once there are members."""


@dataclass(frozen=True)
class Corners(Init):
    """The space's two corners (all decisions at their first, all at their last option), then
    random rows.

    The corners are there for tight budgets: one of them is usually among the cheapest candidates.
    """

    def __call__(self, space: Space, n: int, asked: int, rng: np.random.Generator) -> Codes:
        """The corners at the very start, then random rows."""
        if asked > 0:
            return space.sample(n, rng)
        return np.concatenate([space.corner(last=False), space.corner(last=True)])

    def left(self, size: int, asked: int, members: Population) -> int:
        """As many as the population has room for."""
        return max(size - asked, 0)


@dataclass(frozen=True)
class Below(Init):
    """Random rows whose price is at most the threshold (EEEA-Net; Termritthikun et al., 2021).

    Where hardly any row is that cheap, the cheapest of `64 n` draws fill what is missing.
    """

    price: Price
    threshold: float

    def __call__(self, space: Space, n: int, asked: int, rng: np.random.Generator) -> Codes:
        """n rows, redrawn until they are cheap enough."""
        cheap, dear = [], []
        found = drawn = 0
        while found < n and drawn < _DRAWS * n:
            codes = space.sample(2 * n, rng)
            prices = np.asarray(self.price(codes), dtype=float)
            good = prices <= self.threshold
            cheap.append(codes[good])
            dear.append((codes[~good], prices[~good]))
            found, drawn = found + int(good.sum()), drawn + len(codes)
        rest = np.concatenate([codes for codes, _ in dear])
        order = np.argsort(np.concatenate([prices for _, prices in dear]), kind="stable")
        return np.concatenate([*cheap, rest[order]])[:n]

    def left(self, size: int, asked: int, members: Population) -> int:
        """As many as the population has room for."""
        return max(size - asked, 0)


@dataclass(frozen=True)
class Kept(Init):
    """Random rows until the population is full of rows that keep every limit, or `tries` times
    its size were asked."""

    tries: int = 4

    def __call__(self, space: Space, n: int, asked: int, rng: np.random.Generator) -> Codes:
        """n random rows."""
        return space.sample(n, rng)

    def left(self, size: int, asked: int, members: Population) -> int:
        """A place for each member that breaks a limit, and for each that is missing."""
        room = max(self.tries * size - asked, 0)
        return min(size - int(members.kept.sum()), room)


class Select(ABC):
    """Chooses parents."""

    @abstractmethod
    def __call__(self, population: Population, n: int, rng: np.random.Generator) -> Index:
        """The rows of n parents; a row may be chosen again."""


@dataclass(frozen=True)
class Tournament(Select):
    """The best of `size` rows drawn at random, with replacement.

    Best is by constraint domination, then crowding: with size 2 the crowded tournament of NSGA-II
    (Deb et al., 2002), with one objective the tournament of regularised evolution.
    """

    size: int = 2

    def __call__(self, population: Population, n: int, rng: np.random.Generator) -> Index:
        """The winners of n tournaments."""
        order = population.best_first
        drawn = rng.integers(0, len(order), size=(n, self.size))  # places in the order
        winners: Index = order[drawn.min(axis=1)]
        return winners


class Vary(ABC):
    """Makes children."""

    @abstractmethod
    def __call__(
        self, space: Space, population: Population, select: Select, n: int, rng: np.random.Generator
    ) -> Codes:
        """n children as codes; they need not be new."""


@dataclass(frozen=True)
class Mutate(Vary):
    """A mutated copy of one parent; `rate` is the share of decisions that change."""

    rate: float | None = None

    def __call__(
        self, space: Space, population: Population, select: Select, n: int, rng: np.random.Generator
    ) -> Codes:
        """n mutated copies."""
        parents = population.codes[select(population, n, rng)]
        return space.mutate(parents, rng, self.rate)


@dataclass(frozen=True)
class CrossAndMutate(Vary):
    """A child of two parents, mutated; with probability `1 - cross` a copy of one, mutated."""

    cross: float = 0.9
    rate: float | None = None

    def __call__(
        self, space: Space, population: Population, select: Select, n: int, rng: np.random.Generator
    ) -> Codes:
        """n children."""
        mothers = population.codes[select(population, n, rng)]
        fathers = population.codes[select(population, n, rng)]
        both = rng.random(n) < self.cross
        children = np.where(both[:, None], space.cross(mothers, fathers, rng), mothers)
        return space.mutate(children, rng, self.rate)


class Survive(ABC):
    """Decides who stays."""

    @abstractmethod
    def __call__(self, population: Population, size: int) -> Index:
        """Up to `size` rows that stay, in rising order, so that age stays the order of rows."""


@dataclass(frozen=True)
class Best(Survive):
    """The best of parents and children together (elitism of NSGA-II; Deb et al., 2002)."""

    def __call__(self, population: Population, size: int) -> Index:
        """The first `size` by rank and crowding."""
        return np.sort(population.best_first[:size])


@dataclass(frozen=True)
class Youngest(Survive):
    """The youngest that keep the limits (regularised evolution; Real et al., 2019).

    The published method knows no limits. Here, rows that break them never push out rows that keep
    them: they fill the places left, the least broken first, and so lead towards feasibility.
    """

    def __call__(self, population: Population, size: int) -> Index:
        """The last `size` kept rows; then the least broken."""
        if population.kept.all():
            return np.arange(len(population))[-size:]
        kept = np.flatnonzero(population.kept)[-size:]
        broken = np.flatnonzero(~population.kept)
        order = np.lexsort((-broken, population.violations[broken]))
        fill = broken[order[: size - len(kept)]]
        return np.sort(np.concatenate([kept, fill])).astype(np.int64)
