"""Where rows stand in a list of known rows: microseconds a question."""

from __future__ import annotations

from functools import cached_property
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.errors import EspalierError
from espalier.space.space import Space

Codes = NDArray[Any]
Index = NDArray[np.int64]

_DENSE = 1 << 22  # the most slots of an array that has one for each possible row


class Lookup:
    """Row numbers of codes among `codes` `(n, d)`, which are canonical and different.

    A space of up to four million combinations has an array with a slot for each; others have a
    dictionary of keys. `what` names the list in errors.
    """

    def __init__(self, space: Space, codes: Codes, what: str = "the table") -> None:
        self.space, self.codes, self.what = space, codes, what
        counts = tuple(d.count for d in space.decisions)
        discrete = space.dtype.kind == "i"
        self._counts = counts if discrete and 0 < prod(counts) <= _DENSE else None

    def find(self, codes: Codes) -> Index:
        """Row numbers `(m,)` of canonical codes `(m, d)`, -1 where there is no such row."""
        if self._counts is None or codes.dtype.kind != "i":
            known = self._keys
            return np.array([known.get(k, -1) for k in self._asked(codes)], dtype=np.int64)
        try:
            return np.asarray(self._slots[np.ravel_multi_index(tuple(codes.T), self._counts)])
        except ValueError:  # a code out of range, or a wrong number of columns: the slow way
            ok = self.space.valid(codes)
            out = np.full(len(codes), -1, dtype=np.int64)
            if ok.any():
                out[ok] = self._slots[np.ravel_multi_index(tuple(codes[ok].T), self._counts)]
            return out

    def rows(self, codes: Codes) -> Index:
        """As `find`. Errors: `EspalierError` names the first candidate that is absent."""
        found = self.find(codes)
        if len(found) and found.min() < 0:
            (absent,) = self.space.decode(codes[np.flatnonzero(found < 0)[:1]])
            raise EspalierError(
                f"{self.what} has no row for the candidate {absent}: it holds {len(self.codes):,} "
                f"of the space's {self.space.size:,}; ask only for rows of its codes"
            )
        return found

    @cached_property
    def _slots(self) -> Index:
        assert self._counts is not None
        slots = np.full(prod(self._counts), -1, dtype=np.int64)
        slots[np.ravel_multi_index(tuple(self.codes.T), self._counts)] = np.arange(len(self.codes))
        return slots

    @cached_property
    def _keys(self) -> dict[Any, int]:
        return {key: row for row, key in enumerate(self.space.keys(self.codes).tolist())}

    def _asked(self, codes: Codes) -> list[Any]:
        """Keys; None for rows that are none of the space's, which may have another row's key."""
        ok = self.space.valid(codes)
        if ok.all():
            keys: list[Any] = self.space.keys(codes).tolist()
            return keys
        out: list[Any] = [None] * len(codes)
        for i, key in zip(np.flatnonzero(ok), self.space.keys(codes[ok]).tolist(), strict=True):
            out[int(i)] = key
        return out

    def __getstate__(self) -> dict[str, Any]:
        # what can be made again does not travel
        return {k: v for k, v in self.__dict__.items() if k not in ("_slots", "_keys")}
