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
    values = whole.ravel()
    order = np.argsort(values, kind="stable")
    ordered, owner = values[order], order // whole.shape[1]
    found = np.array([_row(row, ordered, owner) for row in rows], dtype=np.int64)
    # rows of zeros tell nothing: they are the original's rows of zeros, in order
    silent = iter(np.setdiff1d(np.flatnonzero(~whole.any(axis=1)), found))
    for at in np.flatnonzero(~rows.any(axis=1)):
        found[at] = next(silent, -1)
    if (found < 0).any() or len(np.unique(found)) < len(found):
        return None
    return torch.from_numpy(found)


def _row(row: NDArray[np.floating], ordered: NDArray[np.floating], owner: NDArray[np.int64]) -> int:
    """The row that most of the values are from; -1 where there is none."""
    told = row[row != 0][:_LOOKED_AT]
    if not len(told):
        return -1
    low, high = (np.searchsorted(ordered, told, side) for side in ("left", "right"))
    votes = np.zeros(int(owner.max()) + 1)
    for start, end in zip(low, high, strict=True):
        votes[np.unique(owner[start:end])] += 1
    best = int(votes.argmax())
    alone = int((votes == votes[best]).sum()) == 1
    return best if alone and votes[best] > _SURE * len(told) else -1
