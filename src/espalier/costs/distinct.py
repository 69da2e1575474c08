"""Distinct rows of codes among a few columns, fast where options are few."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Index = NDArray[np.int64]


def distinct(codes: NDArray[Any], columns: list[int]) -> tuple[Index, Index]:
    """Indices of one row of each kind, and for each row of `codes` the kind it is of.

    Rows are of one kind when they agree in `columns`; kinds come in the order of their codes.
    """
    n = len(codes)
    if n == 0 or not columns:
        return np.zeros(min(n, 1), dtype=np.int64), np.zeros(n, dtype=np.int64)
    if codes.dtype.kind == "f":
        _, first, inverse = np.unique(
            codes[:, columns], axis=0, return_index=True, return_inverse=True
        )
        return first, inverse.reshape(-1)
    key, size = _keys(codes, columns)
    if size > max(4 * n, 1 << 16):
        _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
        return first, inverse
    # one slot for each possible key: no sorting
    slot = np.full(size, -1, dtype=np.int64)
    slot[key[::-1]] = np.arange(n - 1, -1, -1)
    used = np.flatnonzero(slot >= 0)
    rank = np.empty(size, dtype=np.int64)
    rank[used] = np.arange(len(used))
    return slot[used], rank[key]


def _keys(codes: NDArray[Any], columns: list[int]) -> tuple[Index, int]:
    """One whole number a row, equal for rows that agree, and an upper bound of them."""
    key = np.zeros(len(codes), dtype=np.int64)
    size = 1
    for j in columns:
        column = codes[:, j].astype(np.int64)
        low, width = int(column.min()), int(column.max() - column.min()) + 1
        if size > (1 << 62) // width:
            # too many to number at once: number those that are there
            _, key = np.unique(key, return_inverse=True)
            size = len(codes)
        key = key * width + (column - low)
        size *= width
    return key, size
