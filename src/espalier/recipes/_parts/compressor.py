"""Small transformers that read a window of tokens and say what it is from, and a search of their size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from espalier.nets.family import Family
from espalier.nets.plain import traced
from espalier.nets.transformer import Body, initialise
from espalier.space import Candidate, Space, ordinal

GENES = ("vocabulary", "depth", "heads", "width", "hidden")
Rows = NDArray[np.int64]


class _Encoder(nn.Module):
    def __init__(
        self, vocabulary: int, depth: int, heads: int, width: int, hidden: int, tokens: int, of: int
    ) -> None:
        super().__init__()
        self.last = vocabulary - 1
        self.embed = nn.Embedding(vocabulary, width)
        self.body = Body(depth, width, heads, hidden, tokens, causal=False)
        self.head = nn.Linear(width, of)
        initialise(self, width**-0.5)  # 0.02 is for widths of hundreds: narrow ones learn slower

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(self.embed(x.long().clamp(0, self.last))).mean(1))
        return out


class Students(Family):
    """Encoders of `tokens` tokens to `classes` logits. The published ranges, a few sizes smaller."""

    name = "students"

    def __init__(self, tokens: int, classes: int) -> None:
        self.shape, self.classes = (tokens,), classes
        self._space = Space(
            [
                ordinal("vocabulary", *range(256, 1025, 32)),
                ordinal("depth", *range(1, 9)),
                ordinal("heads", 1, 2, 4, 8),
                ordinal("width", *range(16, 129, 8)),
                ordinal("hidden", *range(16, 513, 16)),
            ]
        )

    @property
    def space(self) -> Space:
        """Five decisions."""
        return self._space

    def build(self, candidate: Candidate) -> nn.Module:
        """The encoder of a candidate."""
        sizes = {name: int(self._space.candidate(candidate)[name]) for name in GENES}
        return traced(_Encoder(**sizes, tokens=self.shape[0], of=self.classes), "Student")

    def values(self, codes: Rows) -> dict[str, Rows]:
        """Each gene's values for codes `(n, 5)`."""
        columns = [np.asarray(self._space[name].options, dtype=np.int64) for name in GENES]
        return {
            name: c[codes[:, i]] for i, (name, c) in enumerate(zip(GENES, columns, strict=True))
        }

    def params(self, codes: Rows) -> Rows:
        """Weights of codes `(n, 5)`, by formula."""
        v = self.values(codes)
        width, hidden = v["width"], v["hidden"]
        block = 4 * width * (width + 1) + 2 * width * hidden + hidden + width + 4 * width
        rest = (v["vocabulary"] + self.shape[0]) * width + 2 * width
        found: Rows = rest + v["depth"] * block + (width + 1) * self.classes
        return found

    def macs(self, codes: Rows) -> Rows:
        """Multiply-accumulates of codes `(n, 5)` on one window, by formula."""
        v = self.values(codes)
        width, tokens = v["width"], self.shape[0]
        block = tokens * (4 * width * width + 2 * width * v["hidden"]) + 2 * tokens**2 * width
        found: Rows = v["depth"] * block + width * self.classes
        return found


@dataclass(frozen=True)
class Genetic:
    """The published search: what children are made of, and which of all stay; begun anew `times`."""

    population: int = 50
    generations: int = 100
    crossover: float = 0.6
    times: int = 10

    def run(
        self, sizes: NDArray[np.int64], fitness: Callable[[Rows], NDArray[np.float64]], seed: int
    ) -> Rows:
        """All rows `(n, genes)` that it looked at, each once, for `sizes` options a gene."""
        seen: dict[tuple[int, ...], None] = {}
        for time in range(self.times):
            seen |= self._once(sizes, fitness, np.random.default_rng([seed, 0x6E, time]))
        return np.array(list(seen))

    def _once(
        self,
        sizes: NDArray[np.int64],
        fitness: Callable[[Rows], NDArray[np.float64]],
        rng: np.random.Generator,
    ) -> dict[tuple[int, ...], None]:
        rows = rng.integers(0, sizes, (self.population, len(sizes)))
        seen: dict[tuple[int, ...], None] = {tuple(row): None for row in rows.tolist()}
        for _ in range(self.generations):
            children = []
            for _ in range(self.population):
                child = self._child(rows, sizes, rng)
                for _ in range(20):  # a duplicate is mutated until it is none
                    if tuple(child.tolist()) not in seen:
                        break
                    child = _mutated(child, sizes, rng)
                seen[tuple(child.tolist())] = None
                children.append(child)
            both = np.unique(np.concatenate([rows, np.array(children)]), axis=0)
            rows = both[np.argsort(-fitness(both), kind="stable")[: self.population]]
        return seen

    def _child(self, rows: Rows, sizes: NDArray[np.int64], rng: np.random.Generator) -> Rows:
        first, second = rows[rng.integers(0, len(rows), 2)]
        if rng.random() >= self.crossover:
            return _mutated(first, sizes, rng)
        cut = int(rng.integers(1, len(sizes)))
        return np.concatenate([first[:cut], second[cut:]])


def _mutated(row: Rows, sizes: NDArray[np.int64], rng: np.random.Generator) -> Rows:
    """Every gene from a random one on is drawn anew."""
    locus = int(rng.integers(0, len(sizes)))
    return np.concatenate([row[:locus], rng.integers(0, sizes[locus:])])
