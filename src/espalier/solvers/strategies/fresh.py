"""What was proposed already, and candidates that were not."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.errors import SpaceError
from espalier.solvers.strategies.population import pack, unpack
from espalier.space import Space

Codes = NDArray[Any]
Propose = Callable[[int], Codes]

_ROUNDS = 8  # draws before a proposer is taken to be dry
_ENUMERABLE = 1_000_000  # a space of more rows is not listed,
_ENUMERABLE_CONSTRAINED = 50_000  # unless constraints leave no more than these


class Seen:
    """The rows of a space that were proposed or told, to be never proposed again.

    `fresh` draws rows that are valid and new; where drawing finds too few, a space small enough to
    be listed is listed, so that a strategy ends exactly when the space does.
    """

    def __init__(self, space: Space) -> None:
        self.space = space
        self._rows: list[Codes] = []
        self._keys: set[Any] = set()
        self._unlisted: Codes | None = None  # what of the listed space was new at the last look

    def __len__(self) -> int:
        return len(self._keys)

    def new(self, codes: Codes) -> Codes:
        """The valid rows not seen, each once, in order."""
        return codes[self.new_rows(codes)]

    def new_rows(self, codes: Codes) -> NDArray[np.int64]:
        """Which rows are valid and not seen, each once: their numbers, rising."""
        valid = np.flatnonzero(self.space.valid(codes))
        out, here = [], set()
        for i, key in zip(valid.tolist(), self.space.keys(codes[valid]).tolist(), strict=True):
            if key not in self._keys and key not in here:
                here.add(key)
                out.append(i)
        return np.array(out, dtype=np.int64)

    def add(self, codes: Codes) -> None:
        """Marks rows as seen."""
        rows = []
        for i, key in enumerate(self.space.keys(codes).tolist()):
            if key not in self._keys:
                self._keys.add(key)
                rows.append(i)
        if rows:
            self._rows.append(np.array(codes[np.array(rows, dtype=np.int64)]))

    def fresh(self, n: int, rng: np.random.Generator, propose: Propose | None = None) -> Codes:
        """Up to n new rows, marked as seen: from `propose(k)`, then drawn, then listed.

        Raises `SpaceError` where hardly any draw keeps the constraints and listing does not help.
        """
        parts = [self._empty()]
        hopeless: SpaceError | None = None
        for source in (propose, lambda k: self.space.sample(k, rng)):
            try:
                parts.append(self._take(n - sum(map(len, parts)), source))
            except SpaceError as error:
                hopeless = error
        missing = n - sum(map(len, parts))
        if missing > 0:
            left = self._left()
            parts.append(left[rng.permutation(len(left))[:missing]])
            self.add(parts[-1])
        if hopeless is not None and n > 0 and len(self) == 0:
            raise hopeless
        return np.concatenate(parts)

    def _take(self, n: int, source: Propose | None) -> Codes:
        """Up to n new rows of a source, marked as seen."""
        parts = [self._empty()]
        for _ in range(_ROUNDS):
            if source is None or n <= 0 or len(self) >= self.space.size:
                break
            found = self.new(source(n))[:n]
            self.add(found)
            parts.append(found)
            n -= len(found)
        return np.concatenate(parts)

    def _left(self) -> Codes:
        """Every unseen row, in the order of the space; none where the space is too large to list.

        Kept between calls and filtered: the answer depends on what was seen alone.
        """
        if self._unlisted is None:
            self._unlisted = self._listed()
        self._unlisted = self.new(self._unlisted)
        return self._unlisted

    def _listed(self) -> Codes:
        if self.space.size <= _ENUMERABLE:
            return self.space.enumerate(_ENUMERABLE)
        if not self.space.constraints or self.space.size == math.inf:
            return self._empty()
        with suppress(SpaceError):  # constraints may leave few rows of a large space
            return self.space.enumerate(_ENUMERABLE_CONSTRAINED)
        return self._empty()

    def _empty(self) -> Codes:
        return np.zeros((0, len(self.space)), dtype=self.space.dtype)

    def to_json(self) -> dict[str, Any]:
        """All rows seen, deflated."""
        self._rows = [np.concatenate([self._empty(), *self._rows])]
        return pack(self._rows[0])

    @classmethod
    def from_json(cls, space: Space, data: dict[str, Any]) -> Seen:
        """What `to_json` wrote."""
        out = cls(space)
        out.add(unpack(data))
        return out
