"""Hypervolume over queries: how much of a table's trade-off a run has found so far.

The front is chosen by what chooses (validation) and measured by what reports (test). It is bounded by
the worst value of each objective in the table and divided by the volume of the table's own front, so
that 1 is everything there is. Zitzler & Thiele, "Multiobjective Evolutionary Algorithms: A Comparative
Case Study and the Strength Pareto Approach" (1999).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from espalier.bench.regret import report_column
from espalier.bench.told import Told
from espalier.bench.trace import Trace
from espalier.problem import front, hypervolume

if TYPE_CHECKING:
    from espalier.bench.table import Table

Array = NDArray[np.float64]
Index = NDArray[np.int64]


@dataclass(frozen=True)
class Volume:
    """The trade-off of a table: `choice` and `report` `(n, m)`, minimised and scaled to 0..1 over
    the table; `kept` rows; `whole` the volume of the table's front; `low`, `span` of the scaling."""

    choice: Array
    report: Array
    kept: NDArray[np.bool_]
    whole: float
    low: Array
    span: Array


def volume(table: Table, view: Told) -> Volume:
    """What hypervolumes of a race are measured by."""
    signs = np.array([1.0 if o.goal == "min" else -1.0 for o in view.problem.objectives])
    names = [report_column(table, name) for name in view.names]
    report = np.stack([np.asarray(table.columns[n], dtype=float) for n in names], 1) * signs
    low, high = np.nanmin(report, axis=0), np.nanmax(report, axis=0)
    span = np.where(high > low, high - low, 1.0)
    scaled = (report - low) / span
    kept = (view.violations <= 0) & ~np.isnan(report).any(axis=1)
    whole = dominated(scaled[kept])
    return Volume(view.values, scaled, kept, whole, low, span)


def rescaled(table: Table, view: Told, base: Volume) -> Volume:
    """Another table of the same metrics, measured by the volume of `base`."""
    mine = volume(table, view)
    report = (mine.report * mine.span + mine.low - base.low) / base.span
    return Volume(mine.choice, report, mine.kept, base.whole, base.low, base.span)


def dominated(points: Array) -> float:
    """Hypervolume of points `(n, m)` in 0..1, bounded by 1 in every objective."""
    points = points[(points < 1.0).all(axis=1)]
    if len(points) == 0:
        return 0.0
    m = points.shape[1]
    if m != 2:
        return hypervolume(points, np.ones(m))
    ends = points[_front(points)]
    steps = np.concatenate([[1.0], ends[:-1, 1]]) - ends[:, 1]
    return float(((1.0 - ends[:, 0]) * steps).sum())


def _front(points: Array) -> Index:
    """Rows that no other dominates, by the first objective; two objectives in n log n."""
    if points.shape[1] != 2:
        return front(points)
    order = np.lexsort((points[:, 1], points[:, 0]))
    second = points[order, 1]
    before = np.concatenate([[np.inf], np.minimum.accumulate(second)[:-1]])
    best: Index = order[second < before].astype(np.int64)
    return best


def share(trace: Trace, volume: Volume, checkpoints: Index) -> Array:
    """The share of the table's hypervolume `(c,)` found after each of some numbers of queries."""
    at = np.maximum(trace.rows, 0)
    known = trace.rows >= 0
    choice, report, kept = volume.choice[at], volume.report[at], volume.kept[at].copy()
    if not known.all():  # predicted: chosen and reported by the same number
        choice, report = choice.copy(), report.copy()
        choice[~known] = trace.values[~known]
        report[~known] = (trace.values[~known] - volume.low) / volume.span
        kept[~known] = trace.violations[~known] <= 0
    out = np.zeros(len(checkpoints))
    front_so_far = np.zeros(0, dtype=np.int64)
    done = 0
    for i, upto in enumerate(checkpoints):
        fresh = np.flatnonzero(kept[done:upto]) + done
        if len(fresh):
            rows = np.concatenate([front_so_far, fresh])
            front_so_far = rows[_front(choice[rows])]
            out[i] = dominated(report[front_so_far]) / volume.whole
        elif i:
            out[i] = out[i - 1]
        done = max(done, int(upto))
    return out
