"""Simple regret: what is lost against the best of the table by taking what looks best so far.

Looks best: by the validation column among the rows that keep the limits. Lost: in the test column,
in the table's unit. Before any row keeps the limits, the loss is the largest there is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from espalier.bench.told import Told
from espalier.bench.trace import Trace

if TYPE_CHECKING:
    from espalier.bench.table import Table

Array = NDArray[np.float64]
Index = NDArray[np.int64]


@dataclass(frozen=True)
class Judge:
    """How one objective is judged: `choice` (n,) what chooses and `report` (n,) what is reported,
    both minimised; `kept` (n,) which rows keep the limits; `column` its place among the objectives.
    """

    column: int
    choice: Array
    report: Array
    kept: NDArray[np.bool_]
    report_name: str
    maximised: bool

    @property
    def best(self) -> float:
        """The best report among the rows that keep the limits, minimised."""
        return float(np.nanmin(self.report[self.kept]))

    @property
    def worst(self) -> float:
        """The worst report of the table, minimised."""
        return float(np.nanmax(self.report))

    @property
    def winner(self) -> int:
        """The row that is best by what chooses: all that any strategy can find."""
        rows = np.flatnonzero(self.kept)
        return int(rows[np.nanargmin(self.choice[rows])])

    def shown(self, report: Array) -> Array:
        """Reports as the table has them, no longer minimised."""
        return -report if self.maximised else report


def judge(table: Table, view: Told) -> Judge:
    """The judge of a race: by the validation column where it is an objective, else by the first."""
    column = view.names.index(table.validation) if table.validation in view.names else 0
    name = report_column(table, view.names[column])
    maximised = view.problem.objectives[column].goal == "max"
    report = np.asarray(table.columns[name], dtype=float) * (-1.0 if maximised else 1.0)
    return Judge(column, view.values[:, column], report, view.violations <= 0, name, maximised)


def report_column(table: Table, objective: str) -> str:
    """The column that reports an objective: test for validation, each other one itself."""
    return table.test if objective == table.validation else objective


def chosen(trace: Trace, judge: Judge) -> Index:
    """Which query `(q,)` looks best after each query; -1 before any keeps the limits. The first
    of equals stays."""
    known = trace.rows >= 0
    at = np.maximum(trace.rows, 0)
    value = judge.choice[at].copy()
    kept = judge.kept[at].copy()
    if not known.all():
        value[~known] = trace.values[~known, judge.column]
        kept[~known] = trace.violations[~known] <= 0
    value = np.where(kept & ~np.isnan(value), value, np.inf)
    best = np.minimum.accumulate(value)
    fresh = np.concatenate([[True], best[1:] < best[:-1]]) & np.isfinite(best)
    return np.maximum.accumulate(np.where(fresh, np.arange(len(value)), -1))


def regret(trace: Trace, judge: Judge, queries: int | None = None) -> Array:
    """Test regret `(q,)` after each query, 0 best; held at its last value up to `queries`."""
    pick = chosen(trace, judge)
    at = np.maximum(pick, 0)
    rows = trace.rows[at]
    report = judge.report[np.maximum(rows, 0)].copy()
    if (rows < 0).any():
        report[rows < 0] = trace.values[at[rows < 0], judge.column]
    report = np.where(pick < 0, judge.worst, report) - judge.best
    return report if queries is None else held(report, queries)


def held(curve: Array, queries: int) -> Array:
    """A curve of exactly `queries` points: cut, or its last value held."""
    short = max(queries - len(curve), 0)
    return np.concatenate([curve[:queries], np.full(short, curve[-1])])


def over_time(times: Array, curve: Array, grid: Array, before: float) -> Array:
    """A stepped curve read at the times of a grid; `before` its first step."""
    at = np.searchsorted(times, grid, side="right") - 1
    read: Array = np.where(at < 0, before, curve[np.clip(at, 0, len(curve) - 1)])
    return read


def queries_to_best(trace: Trace, judge: Judge) -> float:
    """The number of the query that found a row as good, by what chooses, as the best; inf if none."""
    rows = trace.rows
    good = (rows >= 0) & judge.kept[np.maximum(rows, 0)]
    good &= judge.choice[np.maximum(rows, 0)] <= judge.choice[judge.winner]
    found = np.flatnonzero(good)
    return float(found[0] + 1) if len(found) else float("inf")
