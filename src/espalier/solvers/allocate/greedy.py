"""Greedy allocation: one change at a time, the one with most harm saved for its cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from espalier.errors import SpaceError
from espalier.space import Space

if TYPE_CHECKING:
    from espalier.solvers.allocate.program import Program

Codes = NDArray[Any]
Array = NDArray[np.float64]


def greedy(program: Program) -> Codes | None:
    """A row `(1, d)` that keeps the limits; None where no sequence of changes leads to one.

    It begins at the last options, takes back what breaks a limit, each time the change of one
    decision that costs least harm for what it saves, and spends what is left in the other
    direction. Where that leads nowhere it begins at the first options.
    """
    space = program.space
    for last in (True, False):
        row = space.corner(last)
        if not space.valid(row)[0]:
            try:
                row = space.repair(row, np.random.default_rng(0))
            except SpaceError:
                continue
        found = _kept(program, row)
        if found is not None:
            return _spent(program, found)
    return None


def _kept(program: Program, row: Codes) -> Codes | None:
    """Changes until every limit is kept."""
    harm, over, _ = program.judge(row)
    while over[0] > 0:
        rows = _changes(space=program.space, row=row)
        if not len(rows):
            return None
        harms, overs, _ = program.judge(rows)
        better = np.flatnonzero((overs < over[0]) & np.isfinite(harms))
        if not len(better):
            return None
        added = np.maximum(harms[better] - harm[0], 0.0)
        saved = over[0] - overs[better]
        best = better[np.lexsort((-saved, added / saved))[0]]
        row, harm, over = rows[[best]], harms[[best]], overs[[best]]
    return row


def _spent(program: Program, row: Codes) -> Codes:
    """Changes that lower the harm while every limit is kept."""
    harm, _, use = program.judge(row)
    while True:
        rows = _changes(space=program.space, row=row)
        if not len(rows):
            return row
        harms, overs, uses = program.judge(rows)
        better = np.flatnonzero((overs == 0) & (harms < harm[0]))
        if not len(better):
            return row
        saved = harm[0] - harms[better]
        spent = np.maximum(uses[better] - use[0], 0.0)
        with np.errstate(divide="ignore"):
            best = better[np.lexsort((-saved, -saved / spent))[0]]
        row, harm, use = rows[[best]], harms[[best]], uses[[best]]


def _changes(space: Space, row: Codes) -> Codes:
    """Every valid row that differs from a row in one decision, and what follows from that."""
    counts: Sequence[int] = [d.count for d in space.decisions]
    rows = np.repeat(row, sum(counts), axis=0)
    start = 0
    for j, count in enumerate(counts):
        rows[start : start + count, j] = np.arange(count)
        start += count
    rows = space.canonical(rows)
    rows = rows[(rows != row).any(axis=1)]
    out: Codes = rows[space.valid(rows)]
    return out
