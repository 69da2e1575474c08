"""A space as arrays: what the whole-array operations read instead of Python objects.

Arrays of codes are stored by columns (Fortran order): every operation here goes column by column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.errors import SpaceError, unknown
from espalier.space.decisions import Decision, Integer, Real

_WIDEST = 64
Codes = NDArray[Any]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Gate:
    """Column `child` is active where every parent is active and has one of its allowed codes."""

    child: int
    parents: tuple[tuple[int, NDArray[np.int64]], ...]


class Layout:
    """The columns: how many options each has, its ends, and the gates in order of dependence."""

    def __init__(self, decisions: Sequence[Decision]) -> None:
        self.decisions = tuple(decisions)
        self.names = tuple(d.name for d in decisions)
        self.index = {name: j for j, name in enumerate(self.names)}
        if len(self.index) < len(self.names):
            twice = next(n for n in self.names if self.names.count(n) > 1)
            raise SpaceError(f"decisions must have different names, got {twice!r} twice")
        self.counts = tuple(d.count for d in decisions)
        self.real = tuple(isinstance(d, Real) for d in decisions)
        self.low = tuple(d.low if isinstance(d, Real) else 0 for d in decisions)
        self.high = tuple(d.high if isinstance(d, Real) else d.count - 1 for d in decisions)
        # too many options to list one by one: treated as a number on a scale
        self.wide = tuple(
            isinstance(d, Real) or (isinstance(d, Integer) and d.count > _WIDEST) for d in decisions
        )
        self.dtype = self._dtype()
        self.order = self._order()
        self.gates = tuple(self._gate(j) for j in self.order if self.decisions[j].when)
        self.gated = {gate.child for gate in self.gates}
        self.free = [
            j for j, (n, r) in enumerate(zip(self.counts, self.real, strict=True)) if r or n > 1
        ]
        # the same as arrays, for tables of few rows
        self.count = np.array(self.counts, dtype=np.int64)
        self.frees = np.array(self.free, dtype=np.int64)
        self.reals = np.array(self.real, dtype=np.bool_)
        self.lows = np.array(self.low, dtype=self.dtype)
        self.highs = np.array(self.high, dtype=self.dtype)
        self.words = [(columns, self._radices(columns)) for columns in self._words()]

    @property
    def width(self) -> int:
        """The number of columns."""
        return len(self.decisions)

    def _words(self) -> list[list[int]]:
        """Which columns share a 64-bit word: as many discrete as fit; then a real one each."""
        words: list[list[int]] = []
        used = 2**64
        for j in [j for j, is_real in enumerate(self.real) if not is_real]:
            count = self.counts[j]
            if words and used * count <= 2**64:
                words[-1].append(j)
                used *= count
            else:
                words.append([j])
                used = count
        return words + [[j] for j, is_real in enumerate(self.real) if is_real]

    def _radices(self, columns: list[int]) -> NDArray[np.uint64] | None:
        """What each column of a word is multiplied with; None for a real one, which is its bits."""
        if self.real[columns[0]]:
            return None
        out = [1]
        for j in reversed(columns[1:]):
            out.append(out[-1] * self.counts[j])
        return np.array(out[::-1], dtype=np.uint64)

    def _dtype(self) -> np.dtype[Any]:
        if any(self.real):
            return np.dtype(np.float64)
        most = max(self.counts, default=0)
        return np.dtype(np.int16 if most < 2**15 else np.int32 if most < 2**31 else np.int64)

    def _order(self) -> tuple[int, ...]:
        """Columns with parents before children. Errors: `SpaceError` on unknowns and cycles."""
        for d in self.decisions:
            for parent in d.when:
                if parent not in self.index:
                    raise SpaceError(
                        f"decision {d.name!r}: when: {unknown('decision', parent, self.names)}"
                    )
        placed: set[str] = set()
        order: list[int] = []
        while len(order) < len(self.decisions):
            ready = [
                j
                for j, d in enumerate(self.decisions)
                if d.name not in placed and all(p in placed for p in d.when)
            ]
            if not ready:
                left = ", ".join(repr(n) for n in self.names if n not in placed)
                raise SpaceError(f"conditions must not run in a circle, got one among {left}")
            order += ready
            placed |= {self.names[j] for j in ready}
        return tuple(order)

    def _gate(self, j: int) -> Gate:
        child = self.decisions[j]
        parents = []
        for name, allowed in child.when.items():
            parent = self.decisions[self.index[name]]
            if isinstance(parent, Real):
                rule = f"decision {child.name!r}: when: a parent has options to choose from"
                raise SpaceError(f"{rule}, but {name!r} is real")
            try:
                codes = sorted({int(parent.code(option)) for option in allowed})
            except SpaceError as error:
                raise SpaceError(f"decision {child.name!r}: when: {error}") from None
            parents.append((self.index[name], np.array(codes, dtype=np.int64)))
        return Gate(j, tuple(parents))


def empty(layout: Layout, n: int) -> Codes:
    """Room for n rows, stored by columns."""
    return np.empty((n, layout.width), dtype=layout.dtype, order="F")


def checked(layout: Layout, codes: Any) -> Codes:
    """`codes` as an array `(n, d)` of the space's dtype. Errors: `SpaceError` on shape or dtype."""
    out = np.asarray(codes)
    if out.ndim != 2 or out.shape[1] != layout.width:
        raise SpaceError(f"codes must have shape (n, {layout.width}), got {out.shape}")
    if out.dtype == layout.dtype:
        return out
    if out.dtype.kind not in "iuf":
        raise SpaceError(f"codes must be numbers, got dtype {out.dtype}")
    with np.errstate(invalid="ignore"):
        cast = out.astype(layout.dtype)
    if layout.dtype.kind == "i" and not np.array_equal(cast, out):
        row = int(np.flatnonzero((cast != out).any(1))[0])
        raise SpaceError(
            f"codes must be whole numbers that fit {layout.dtype}, got {out[row].tolist()}"
        )
    return cast


def own(layout: Layout, codes: Any) -> Codes:
    """A fresh copy of `codes`, stored by columns."""
    return np.array(checked(layout, codes), order="F", copy=True)
