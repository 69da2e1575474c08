"""Which rows of a layer's weights a cut has kept, found by comparing with the original's."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_LOOKED_AT = 64  # values of a row: enough to be sure
_SURE = 0.5  # share of them that must be found in one row


def kept_rows(cut: Tensor, original: Tensor) -> Tensor | None:
    """Indices `(o,)` of the original's rows that a cut layer's `(o, ...)` were copied from.

    Values, not places, are compared, so the columns may have been cut as well, and values set to 0.
    None where the weights were not copied, or could be those of several rows.
    """
    if len(cut) == len(original):
        return torch.arange(len(cut))
    rows, whole = (t.detach().cpu().flatten(1).numpy() for t in (cut, original))
    values, owner = _owners(whole)
    found = np.array([_row(row, values, owner, len(whole)) for row in rows], dtype=np.int64)
    # rows of zeros tell nothing: they are the original's rows of zeros, in order
    silent = iter(np.setdiff1d(np.flatnonzero(~whole.any(axis=1)), found))
    for at in np.flatnonzero(~rows.any(axis=1)):
        found[at] = next(silent, -1)
    if (found < 0).any() or len(np.unique(found)) < len(found):
        return None
    return torch.from_numpy(found)


def _owners(whole: NDArray[np.floating]) -> tuple[NDArray[np.floating], NDArray[np.int64]]:
    """Values, ascending, and a row that each is from; a value of several rows stands for each once."""
    values = whole.ravel()
    order = np.argsort(values, kind="stable")
    values, owner = values[order], order // whole.shape[1]
    new = np.ones(len(values), dtype=np.bool_)
    new[1:] = (values[1:] != values[:-1]) | (owner[1:] != owner[:-1])
    return values[new], owner[new]


def _row(
    row: NDArray[np.floating], values: NDArray[np.floating], owner: NDArray[np.int64], count: int
) -> int:
    """Which of `count` rows most of the values are from; -1 where there is none."""
    told = row[row != 0][:_LOOKED_AT]
    if not len(told):
        return -1
    low, high = (np.searchsorted(values, told, side) for side in ("left", "right"))
    lengths = high - low
    start = np.repeat(low - np.cumsum(lengths) + lengths, lengths)
    votes = np.bincount(owner[start + np.arange(len(start))], minlength=count)
    best = int(votes.argmax())
    alone = int((votes == votes[best]).sum()) == 1
    return best if alone and votes[best] > _SURE * len(told) else -1
