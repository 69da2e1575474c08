"""Rows as keys, and rows without their repeats."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.space import few
from espalier.space.layout import Codes, Layout

Words = NDArray[np.uint64]
_BLOCK = 1 << 15
_MIX = np.uint64(0x9E3779B97F4A7C15)


def pack(layout: Layout, codes: Codes) -> list[Words]:
    """The rows as 64-bit words `[(n,), ...]`, mixed radix; different rows get different words.

    Rows must be in range. A real number is its bits.
    """
    if few.few(codes):
        return few.words(layout, codes)
    words = [columns for columns, _ in layout.words]
    out = [np.zeros(len(codes), dtype=np.uint64) for _ in words]
    # blocks that stay in the cache: each column is read once, each word written once
    for start in range(0, len(codes), _BLOCK):
        block = codes[start : start + _BLOCK]
        for word, columns in zip(out, words, strict=True):
            here = word[start : start + _BLOCK]
            for j in columns:
                if layout.real[j]:
                    # + 0.0: a negative zero has other bits than zero
                    here[:] = (block[:, j] + 0.0).view(np.uint64)
                else:
                    here *= np.uint64(layout.counts[j])
                    here += block[:, j].astype(np.uint64)
    return out


def keys(layout: Layout, codes: Codes) -> NDArray[Any]:
    """One hashable key a row `(n,)`: uint64 where a row fits 64 bits, else bytes."""
    words = pack(layout, codes)
    if len(words) == 1:
        return words[0]
    if not words:
        return np.zeros(len(codes), dtype=np.uint64)
    # big-endian, so that bytes compare like numbers; a fixed length keeps them unambiguous
    joined = np.ascontiguousarray(np.stack(words, axis=1).astype(">u8"))
    return joined.view(f"S{8 * len(words)}")[:, 0]


def unique(layout: Layout, codes: Codes) -> NDArray[np.int64]:
    """Indices, in increasing order, of the first row of each kind."""
    n = len(codes)
    if n < 2:
        return np.arange(n, dtype=np.int64)
    words = pack(layout, codes)
    if not words:
        return np.zeros(1, dtype=np.int64)
    return _first(words[0] if len(words) == 1 else _mixed(words), words)


def _mixed(words: list[Words]) -> Words:
    """The words of a row mixed into one; different rows may collide, which `_first` sees."""
    out = words[0].copy()
    for word in words[1:]:
        out ^= out >> np.uint64(32)
        out *= _MIX
        out ^= out >> np.uint64(29)
        out += word
    return out


def _first(label: Words, words: list[Words]) -> NDArray[np.int64]:
    order = np.argsort(label)
    ordered = label[order]
    same = ordered[1:] == ordered[:-1]
    if not same.any():
        return np.arange(len(label), dtype=np.int64)
    if len(words) > 1:
        left, right = order[1:][same], order[:-1][same]
        if any((word[left] != word[right]).any() for word in words):
            # two different rows share a label (about one chance in 2^64 / n^2): sort in full
            order = np.lexsort(words[::-1])
            same = np.logical_and.reduce([w[order][1:] == w[order][:-1] for w in words])
    starts = np.concatenate([[0], np.flatnonzero(~same) + 1])
    return np.sort(np.minimum.reduceat(order, starts)).astype(np.int64, copy=False)
