"""What a strategy is told of every row of a table: values to be minimised, violations, seconds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from espalier.errors import EspalierError, unknown
from espalier.problem import Limit, Problem

if TYPE_CHECKING:
    from espalier.bench.table import Table

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Told:
    """The whole table as a strategy sees it: `values` `(n, m)`, `violations` `(n,)`; and the
    virtual `seconds` `(n,)` of one query, None where the table knows none (a query is 1)."""

    problem: Problem
    values: Array
    violations: Array
    seconds: Array | None

    @property
    def names(self) -> tuple[str, ...]:
        """The objectives' names."""
        return tuple(o.name for o in self.problem.objectives)


def told(
    table: Table, objectives: Sequence[str] | None = None, limits: Iterable[Limit] = ()
) -> Told:
    """Reads a table for a race: by default its one objective is what it chooses by.

    A relative limit ("50%") is a share of the largest value in the table. Errors: `EspalierError`
    for an unknown metric, and where no row keeps the limits.
    """
    names = tuple(objectives or (table.validation,))
    if not all(names):
        known = ", ".join(list(table.columns)[:4])
        raise EspalierError(f"{table.name} is a table of costs: name objectives, of {known}, ...")
    bounds = resolved(table, limits)
    for name in [*names, *(bound.metric for bound in bounds)]:
        if name not in table.columns:
            raise EspalierError(unknown(f"metric of {table.name}", name, table.columns))
    if len(set(names)) < len(names):
        raise EspalierError(f"objectives are different metrics, got {', '.join(names)}")
    problem = Problem(tuple(table.about[name] for name in names), bounds)
    signs = np.array([1.0 if o.goal == "min" else -1.0 for o in problem.objectives])
    values = np.stack([np.asarray(table.columns[name], dtype=float) for name in names], axis=1)
    violations = np.zeros(len(values))
    for bound in bounds:
        violations += bound.violation(table.columns[bound.metric])
    if not (violations <= 0).any():
        nearest = int(np.argmin(violations))
        there = ", ".join(f"{b.metric}={table.columns[b.metric][nearest]:g}" for b in bounds)
        raise EspalierError(
            f"no row of {table.name} keeps {', '.join(map(str, bounds))}; the nearest has {there}: "
            "raise the limit"
        )
    return Told(problem, values * signs, violations, query_seconds(table))


def resolved(table: Table, limits: Iterable[Limit]) -> tuple[Limit, ...]:
    """The limits as absolute bounds."""
    out = []
    for limit in limits:
        if limit.metric not in table.columns:
            raise EspalierError(unknown(f"metric of {table.name}", limit.metric, table.columns))
        out.append(limit.resolve(float(np.nanmax(table.columns[limit.metric]))))
    return tuple(out)


def query_seconds(table: Table) -> Array | None:
    """Virtual seconds of one query `(n,)`: every epoch of the row's learning curve; None where
    the table does not know them."""
    if table.epoch_seconds is None:
        return None
    curve = next(iter(table.curves.values()), None)
    epochs = 1 if curve is None else curve.shape[-1]
    return np.asarray(table.epoch_seconds, dtype=float) * epochs
