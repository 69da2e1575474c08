"""What was proposed already, and candidates that were not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
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
        return np.array(list(self._new(codes).values()), dtype=np.int64)

    def _new(self, codes: Codes) -> dict[Any, int]:
        """The keys of the valid rows not seen, and the number of the first row of each."""
        valid = self.space.valid(codes).tolist()
        out: dict[Any, int] = {}
        for i, key in enumerate(self.space.keys(codes).tolist()):
            if key not in self._keys and key not in out and valid[i]:
                out[key] = i
        return out

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
        parts = []
        missing = n
        hopeless: SpaceError | None = None
        for source in (propose, lambda k: self.space.sample(k, rng)):
            if source is None or missing <= 0:
                continue
            try:
                for found in self._take(missing, source):
                    parts.append(found)
                    missing -= len(found)
            except SpaceError as error:
                hopeless = error
        if missing > 0:
            left = self._left()
            parts.append(left[rng.permutation(len(left))[:missing]])
            self.add(parts[-1])
        if hopeless is not None and n > 0 and len(self) == 0:
            raise hopeless
        return parts[0] if len(parts) == 1 else np.concatenate([self._empty(), *parts])

    def _take(self, n: int, source: Propose) -> Iterator[Codes]:
        """Up to n new rows of a source, marked as seen, as they are found."""
        for _ in range(_ROUNDS):
            if n <= 0 or len(self) >= self.space.size:
                return
            codes = source(n)
            new = self._new(codes)
            keys, rows = list(new)[:n], list(new.values())[:n]
            if rows:
                self._keys.update(keys)
                self._rows.append(codes[rows])
                n -= len(rows)
                yield self._rows[-1].copy()

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
