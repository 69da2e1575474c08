"""Candidates at several levels: what was asked and told of each, and who is best at a level."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.solvers.strategies.population import Index, Population, pack, unpack
from espalier.space import Space

Codes = NDArray[Any]
Array = NDArray[np.float64]


class Results:
    """Candidates, numbered in the order they were met; of each, what is known at which level.

    `told[level]` maps a candidate's number to its values and violation, oldest first.
    """

    def __init__(self, space: Space, levels: int) -> None:
        self.space = space
        self.rows: list[Codes] = []
        self.told: list[dict[int, tuple[tuple[float, ...], float]]] = [{} for _ in range(levels)]
        self.asked: list[set[int]] = [set() for _ in range(levels)]
        self.evaluated = [0] * levels  # how many were told that were not refused
        self._numbers: dict[Any, int] = {}
        self._orders: list[list[int] | None] = [[] for _ in range(levels)]
        self._sorted: list[list[float]] = [[] for _ in range(levels)]  # their values

    def number(self, codes: Codes) -> list[int]:
        """The numbers of candidates; who is new gets the next."""
        out = []
        for row, key in zip(codes, self.space.keys(codes).tolist(), strict=True):
            if key not in self._numbers:
                self._numbers[key] = len(self.rows)
                self.rows.append(np.array(row))
            out.append(self._numbers[key])
        return out

    def codes(self, numbers: list[int]) -> Codes:
        """Candidates `(n, d)` by their numbers."""
        rows = [self.rows[i][None] for i in numbers]
        empty = np.zeros((0, len(self.space)), dtype=self.space.dtype)
        return np.concatenate([empty, *rows]).astype(self.space.dtype)

    def tell(self, level: int, number: int, value: Array, violation: float) -> None:
        """One result; a second of the same is ignored."""
        if number not in self.told[level]:
            self.asked[level].add(number)
            self.told[level][number] = (tuple(float(v) for v in value), float(violation))
            self.evaluated[level] += not self.refused(level, number)
            self._place(level, number, value, violation)

    def refused(self, level: int, number: int) -> bool:
        """Whether a candidate broke a limit before anything was paid for it."""
        values, violation = self.told[level].get(number, ((0.0,), 0.0))
        return bool(np.isnan(values).any() and violation > 0)

    def population(self, level: int) -> tuple[list[int], Population]:
        """Who was told at a level, oldest first, and how it did."""
        numbers = list(self.told[level])
        results = [self.told[level][i] for i in numbers]
        values = np.array([v for v, _ in results], dtype=float).reshape(len(numbers), -1)
        violations = np.array([b for _, b in results], dtype=float)
        return numbers, Population.told(self.codes(numbers), values, violations)

    def best(self, level: int) -> list[int]:
        """Who was evaluated at a level and keeps every limit, best first (rank, then crowding)."""
        order = self._orders[level]
        if order is None:
            numbers, people = self.population(level)
            order = [numbers[i] for i in best_first(people) if people.kept[i]]
            self._orders[level] = order
        return order

    def _place(self, level: int, number: int, value: Array, violation: float) -> None:
        """Keeps the order of a level: of one objective by insertion, else it is made anew."""
        order = self._orders[level]
        if len(value) != 1 or order is None:
            self._orders[level] = None
        elif violation <= 0 and not np.isnan(value[0]):
            at = bisect_right(self._sorted[level], float(value[0]))
            self._sorted[level].insert(at, float(value[0]))
            order.insert(at, number)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, exact."""
        levels = []
        for asked, told in zip(self.asked, self.told, strict=True):
            numbers = list(told)
            levels.append(
                {
                    "waiting": sorted(asked - set(numbers)),
                    "told": numbers,
                    "values": pack(np.array([told[i][0] for i in numbers], dtype=float)),
                    "violations": pack(np.array([told[i][1] for i in numbers], dtype=float)),
                }
            )
        return {"rows": pack(self.codes(list(range(len(self.rows))))), "levels": levels}

    @classmethod
    def from_json(cls, space: Space, data: dict[str, Any]) -> Results:
        """What `to_json` wrote."""
        out = cls(space, len(data["levels"]))
        out.number(unpack(data["rows"]))
        for level, known in enumerate(data["levels"]):
            values, violations = unpack(known["values"]), unpack(known["violations"])
            for number, value, broken in zip(known["told"], values, violations, strict=True):
                out.tell(level, number, value, float(broken))
            out.asked[level] |= set(known["waiting"])
        return out


def best_first(people: Population) -> Index:
    """All rows, best first, as `Population.best_first`; of one objective without comparing pairs."""
    if people.values.shape[1] > 1:
        return people.best_first
    # a failed row has no value, and the worst violation
    order = np.lexsort((np.arange(len(people)), people.values[:, 0], people.violations))
    return order.astype(np.int64)
