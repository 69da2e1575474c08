"""The same for few rows: whole tables `(n, d)` at once, where the calls cost more than the rows.

For many rows, column by column is faster, because a column fits the cache. The results obey the
same laws; draws come from the generator in another order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.space.layout import Codes, Layout, Mask

_CELLS = 2048
Rng = np.random.Generator


def few(codes: Codes) -> bool:
    """Whether a table of codes is small enough to be worked on as a whole."""
    return codes.size <= _CELLS


def words(layout: Layout, codes: Codes) -> list[NDArray[np.uint64]]:
    """What `rows.pack` gives: the rows as 64-bit words, mixed radix."""
    out = []
    for columns, radices in layout.words:
        if radices is None:
            out.append((codes[:, columns[0]] + 0.0).view(np.uint64))
        else:
            part = codes if len(columns) == layout.width else codes[:, columns]
            out.append(part.astype(np.uint64) @ radices)
    return out


def in_range(layout: Layout, codes: Codes, masks: dict[int, Mask]) -> Mask:
    """Rows whose active columns all hold codes of the decision."""
    good = (codes >= layout.lows) & (codes <= layout.highs)
    if codes.dtype.kind == "f":
        good &= layout.reals | (codes == np.floor(codes))
    for j, mask in masks.items():
        good[:, j] |= ~mask
    return np.asarray(good.all(axis=1))


def hit(layout: Layout, n: int, masks: dict[int, Mask], rng: Rng, rate: float | None) -> Mask:
    """Which of the free columns `(n, f)` change in each row, each with probability `rate`.

    With None the rate is one over the free columns, and every row changes in one at least.
    """
    free = len(layout.free)
    share = 1 / free if rate is None else rate
    out: Mask = rng.random((n, free)) < share
    gated = [(i, masks[j]) for i, j in enumerate(layout.free) if j in masks]
    for i, mask in gated:
        out[:, i] &= mask
    if rate is not None:
        return out
    same = np.flatnonzero(~out.any(axis=1))
    if len(same) and not gated:
        out[same, rng.integers(0, free, size=len(same))] = True
    elif len(same):
        lot = rng.random((len(same), free))
        for i, mask in gated:
            lot[~mask[same], i] = -1.0
        some = (lot >= 0).any(axis=1)
        out[same[some], lot.argmax(axis=1)[some]] = True
    return out


def shifted(layout: Layout, codes: Codes, rows: Any, columns: Any, rng: Rng) -> None:
    """In place: discrete cells go to another option, each alike."""
    count = layout.count[columns]
    shift = 1 + np.floor(rng.random(len(rows)) * (count - 1))
    codes[rows, columns] = (codes[rows, columns] + shift) % count
