"""Features of candidates for regressors: what a row of codes looks like as a row of numbers.

A feature map is any function from codes `(n, d)` to float64 `(n, k)`. One that has `widths` says
how its columns fall into blocks; kernels give every block its own length scale.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from espalier.space import Categorical, Space

if TYPE_CHECKING:
    from espalier.nets.graphs import Graphs

Codes = NDArray[Any]
Array = NDArray[np.float64]
FeatureMap = Callable[[Codes], Array]


def blocks_of(features: FeatureMap) -> dict[str, tuple[int, ...]]:
    """What a kernel wants to know of a feature map: `widths` of its blocks, which are `linear`."""
    return {k: tuple(getattr(features, k)) for k in ("widths", "linear") if hasattr(features, k)}


@dataclass(frozen=True)
class Blocks:
    """Feature maps side by side: `parts[i]` gives `widths[i]` columns; those in `linear` are
    numbers such as the logarithm of a cost, whose effect goes on beyond the rows known."""

    parts: tuple[FeatureMap, ...]
    widths: tuple[int, ...]
    linear: tuple[int, ...] = ()

    def __call__(self, codes: Codes) -> Array:
        """All columns `(n, sum of widths)`."""
        return np.concatenate([np.asarray(p(codes), dtype=np.float64) for p in self.parts], axis=1)


class Arranged:
    """Features of no declared blocks, arranged into two: columns of only 0 and 1, and numbers, each
    scaled to mean 0 and deviation 1. What a column is, is seen on 256 random rows of the space;
    columns that are the same in all are left out.
    """

    def __init__(self, features: FeatureMap, space: Space) -> None:
        self.features = features
        seen = np.asarray(features(space.sample(256, np.random.default_rng(0))), dtype=np.float64)
        varies = np.ptp(seen, axis=0) > 0
        flags = ((seen == 0) | (seen == 1)).all(axis=0)
        self._flags = np.flatnonzero(varies & flags)
        self._numbers = np.flatnonzero(varies & ~flags)
        self._shift = seen[:, self._numbers].mean(axis=0)
        self._unit = seen[:, self._numbers].std(axis=0)
        counts = len(self._flags), len(self._numbers)
        self.widths = tuple(n for n in counts if n) or (1,)

    def __call__(self, codes: Codes) -> Array:
        """Both blocks `(n, k)`."""
        x = np.asarray(self.features(codes), dtype=np.float64)
        numbers = (x[:, self._numbers] - self._shift) / self._unit
        out = np.concatenate([x[:, self._flags], numbers], axis=1)
        return out if out.shape[1] else np.zeros((len(x), 1))


def blocked(features: FeatureMap | None, space: Space) -> FeatureMap:
    """Features that have blocks: as they are if they do, `Arranged` else, `OneHot` for None."""
    if features is None:
        return OneHot(space)
    return features if hasattr(features, "widths") else Arranged(features, space)


@dataclass(frozen=True)
class OneHot:
    """The features of any space: its one-hot columns, and its ordered decisions on a scale.

    The second block has a column for each ordinal, integer or real decision with a choice: where
    its option stands from 0 to 1 (one half where it is inactive). A kernel then weighs "which
    option" against "how large".
    """

    space: Space

    def __call__(self, codes: Codes) -> Array:
        """Both blocks `(n, k)`."""
        hot = self.space.one_hot(codes).astype(np.float64)
        return np.concatenate([hot, self._ordered(codes)], axis=1)

    @property
    def widths(self) -> tuple[int, ...]:
        """One-hot columns, and columns of ordered decisions (left out where there are none)."""
        ordered = len(_ordered(self.space))
        return (len(self.space.one_hot_names), *((ordered,) if ordered else ()))

    def _ordered(self, codes: Codes) -> Array:
        columns = _ordered(self.space)
        out = np.full((len(codes), len(columns)), 0.5)
        if not columns:
            return out
        on = self.space.active(codes)
        for k, j in enumerate(columns):
            last = self.space.decisions[j].count - 1
            out[on[:, j], k] = codes[on[:, j], j] / last
        return out


@lru_cache(maxsize=64)
def _ordered(space: Space) -> tuple[int, ...]:
    """Ordered decisions that one-hot columns tear apart; those of one column stand there already."""
    names = set(space.one_hot_names)
    return tuple(
        j
        for j, d in enumerate(space.decisions)
        if not isinstance(d, Categorical) and d.count > 1 and d.name not in names
    )


# --- features of operator graphs ------------------------------------------------------------------


@dataclass(frozen=True)
class Adjacency:
    """The adjacency matrix (upper triangle) and the one-hot operators of every node."""

    graphs: Callable[[Codes], Graphs]

    def __call__(self, codes: Codes) -> Array:
        """`(n, v (v - 1) / 2 + v |vocabulary|)`."""
        g = self.graphs(codes)
        above = np.triu_indices(g.adjacency.shape[1], 1)
        hot = g.operators[:, :, None] == np.arange(len(g.vocabulary))
        edges = g.adjacency[:, above[0], above[1]]
        return np.concatenate([edges, hot.reshape(len(hot), -1)], axis=1).astype(np.float64)


@dataclass(frozen=True)
class Paths:
    """How often every sequence of operators leads from an input to an output.

    Path encoding of BANANAS (White, Neiswanger & Savani, 2021, https://arxiv.org/abs/1910.11858),
    with square roots of counts in place of presence. Operators named in `silent` are left out of
    the sequences: what goes over an identity goes on unchanged. Sequences are hashed to `columns`
    (Weinberger et al., 2009), so that no list of them is needed.
    """

    graphs: Callable[[Codes], Graphs]
    columns: int = 256
    silent: tuple[str, ...] = ("skip_connect", "identity")

    def __call__(self, codes: Codes) -> Array:
        """`(n, columns)`."""
        g = self.graphs(codes)
        names = [("" if name in self.silent else name) for name in g.vocabulary]
        return _hashed(
            (self._paths(o, a, names) for o, a in zip(g.operators, g.adjacency, strict=True)),
            self.columns,
        )

    def _paths(
        self, operators: NDArray[np.int64], adjacency: NDArray[np.bool_], names: list[str]
    ) -> Counter[str]:
        ending: list[Counter[str]] = []  # at each node: sequences that end there, counted
        total: Counter[str] = Counter()
        for node, operator in enumerate(operators.tolist()):
            here: Counter[str] = Counter()
            before = np.flatnonzero(adjacency[:node, node])
            if operator:
                if not adjacency[:, node].any():
                    here[names[operator]] = 1
                for b in before.tolist():
                    for path, count in ending[b].items():
                        here["/".join(filter(None, (path, names[operator])))] += count
                if not adjacency[node].any():
                    total.update(here)
            ending.append(here)
        return total


@dataclass(frozen=True)
class Neighbourhoods:
    """How often every operator stands in every neighbourhood: a Weisfeiler-Lehman histogram.

    A node's label is its operator; `depth` times, it is joined with the labels of the nodes that
    feed it. As in NAS-BOWL (Ru, Wan, Dong & Osborne, 2021, https://arxiv.org/abs/2006.07556), with
    labels hashed to `columns` and square roots of counts.
    """

    graphs: Callable[[Codes], Graphs]
    depth: int = 2
    columns: int = 256

    def __call__(self, codes: Codes) -> Array:
        """`(n, columns)`."""
        g = self.graphs(codes)
        return _hashed(
            (
                self._labels(o, a, g.vocabulary)
                for o, a in zip(g.operators, g.adjacency, strict=True)
            ),
            self.columns,
        )

    def _labels(
        self, operators: NDArray[np.int64], adjacency: NDArray[np.bool_], names: tuple[str, ...]
    ) -> Counter[str]:
        nodes = np.flatnonzero(operators).tolist()
        labels = {v: names[operators[v]] for v in nodes}
        feeders = {v: [b for b in nodes if adjacency[b, v]] for v in nodes}
        found = Counter(labels.values())
        for _ in range(self.depth):
            labels = {
                v: f"{labels[v]}({','.join(sorted(labels[b] for b in feeders[v]))})" for v in nodes
            }
            found.update(labels.values())
        return found


def _hashed(rows: Iterable[Counter[str]], columns: int) -> Array:
    """Square roots of counts, each label in the column of its hash (the same on every machine)."""
    out = []
    for row in rows:
        line = np.zeros(columns)
        for label, count in row.items():
            line[zlib.crc32(label.encode()) % columns] += count
        out.append(line)
    return np.sqrt(np.array(out).reshape(-1, columns))
