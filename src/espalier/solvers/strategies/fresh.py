"""What was proposed already, and candidates that were not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.solvers.strategies.population import pack, unpack
from espalier.space import Space

Codes = NDArray[Any]
Propose = Callable[[int], Codes]

_ROUNDS = 8  # draws before a proposer is taken to be dry
_ENUMERABLE = 1_000_000  # a space of more rows is never listed


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
        codes = codes[self.space.valid(codes)]
        out, here = [], set()
        for i, key in enumerate(self.space.keys(codes).tolist()):
            if key not in self._keys and key not in here:
                here.add(key)
                out.append(i)
        return codes[np.array(out, dtype=np.int64)]

    def add(self, codes: Codes) -> None:
        """Marks rows as seen."""
        rows = []
        for i, key in enumerate(self.space.keys(codes).tolist()):
            if key not in self._keys:
                self._keys.add(key)
                rows.append(i)
        if rows:
            self._rows.append(np.array(codes[np.array(rows, dtype=np.int64)]))

    def fresh(self, n: int, propose: Propose, rng: np.random.Generator) -> Codes:
        """Up to n new rows, marked as seen: from `propose(k)`, then drawn, then listed."""
        parts = [self._empty()]
        missing = n
        for source in (propose, lambda k: self.space.sample(k, rng)):
            for _ in range(_ROUNDS):
                if missing <= 0:
                    break
                found = self.new(source(missing))[:missing]
                self.add(found)
                parts.append(found)
                missing -= len(found)
                if len(found) == 0 and len(self) >= self.space.size:
                    break
        if missing > 0:
            left = self._left()
            found = left[rng.permutation(len(left))[:missing]]
            self.add(found)
            parts.append(found)
        return np.concatenate(parts)

    def _left(self) -> Codes:
        """Every unseen row, in the order of the space; none where the space is too large to list.

        Kept between calls and filtered: the answer depends on what was seen alone.
        """
        if self.space.size > _ENUMERABLE:
            return self._empty()
        known = self.space.enumerate(_ENUMERABLE) if self._unlisted is None else self._unlisted
        self._unlisted = self.new(known)
        return self._unlisted

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
