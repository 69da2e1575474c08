"""One run of a strategy on a table, one query after the other, as fast as it can be."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from espalier.bench.told import Told, told
from espalier.bench.trace import Trace
from espalier.errors import EspalierError
from espalier.problem import Limit

if TYPE_CHECKING:
    from espalier.bench.table import Table
    from espalier.solvers.strategies import Strategy


def drive(
    strategy: Strategy,
    table: Table,
    queries: int,
    *,
    batch: int = 1,
    objectives: Sequence[str] | None = None,
    limits: Iterable[Limit] = (),
    seen: Told | None = None,
) -> Trace:
    """Asks `batch` candidates at a time, tells their rows, until `queries` are spent.

    Every candidate asked for is a query, also one that breaks a limit. The run ends early where
    the strategy has nothing more to ask. `seen` is `told(table, ...)`, made once for many runs.
    Errors: `EspalierError` for fewer than one query, and for a candidate that the table lacks.
    """
    if queries < 1 or batch < 1:
        raise EspalierError(f"queries and batch are at least 1, got {queries} and {batch}")
    view = seen or told(table, objectives, limits)
    clock = time.perf_counter
    rows: list[NDArray[np.int64]] = []
    values: list[NDArray[np.float64]] = []
    violations: list[NDArray[np.float64]] = []
    done, overhead = 0, 0.0
    while done < queries:
        start = clock()
        codes = strategy.ask(min(batch, queries - done))
        overhead += clock() - start
        if len(codes) == 0:
            break
        found, value, violation = looked_up(table, view, codes)
        start = clock()
        strategy.tell(codes, value, violation)
        overhead += clock() - start
        rows.append(found)
        values.append(value)
        violations.append(violation)
        done += len(found)
    if not rows:
        raise EspalierError(f"{strategy.name} asked for no candidate of {table.name}")
    queried = np.concatenate(rows)
    return Trace(
        queried,
        np.concatenate(values),
        np.concatenate(violations),
        np.cumsum(_seconds(view, queried)),
        overhead,
    )


def looked_up(
    table: Table, view: Told, codes: NDArray[Any]
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Row numbers, values and violations of candidates. A table that predicts what it lacks gives
    row -1 and the prediction. Errors: `EspalierError` for a candidate that the table lacks."""
    found = table.find(codes)
    if found.min() >= 0:
        return found, view.values[found], view.violations[found]
    names = [*view.names, *(limit.metric for limit in view.problem.limits)]
    metrics = table.metrics(tuple(dict.fromkeys(names)), codes)
    return found, view.problem.values(metrics), view.problem.violations(metrics)


def _seconds(view: Told, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    if view.seconds is None:
        return np.ones(len(rows))
    # a row that is not in the table takes as long as the average one
    return np.where(rows >= 0, view.seconds[np.maximum(rows, 0)], view.seconds.mean())
