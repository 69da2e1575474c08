"""The runs of a race read by one protocol: every figure of the page, as plain JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from espalier.bench import significance
from espalier.bench.bootstrap import Band, mean_band
from espalier.bench.ceiling import ceiling
from espalier.bench.entrants import BASELINE
from espalier.bench.improvement import LEAST, improvement
from espalier.bench.regret import (
    Judge,
    judge,
    over_time,
    queries_to_best,
    regret,
)
from espalier.bench.told import Told
from espalier.bench.trace import Trace
from espalier.bench.verdicts import verdicts
from espalier.bench.volume import share, volume

if TYPE_CHECKING:
    from espalier.bench.table import Table

Array = NDArray[np.float64]
Index = NDArray[np.int64]

BUDGETS = (10, 25, 50, 100, 150, 200, 300, 500, 1000)
_POINTS = 150  # of a curve in the JSON
_VOLUMES = 40  # hypervolumes are dearer


def scored(
    table: Table,
    view: Told,
    runs: Mapping[str, Sequence[Trace]],
    seeds: Sequence[int],
    queries: int,
) -> dict[str, Any]:
    """Scores every strategy alike; see `Race.to_json` for what is in it."""
    found = judge(table, view)
    at = checkpoints(queries, _POINTS)
    curves = {
        name: np.stack([regret(trace, found, queries) for trace in traces])
        for name, traces in runs.items()
    }
    last = {name: curve[:, -1] for name, curve in curves.items()}
    several = len(view.names) > 1
    steps = checkpoints(queries, _VOLUMES)
    shares: dict[str, Array] = {}
    if several:
        space = volume(table, view)
        for name, traces in runs.items():
            shares[name] = np.stack([share(trace, space, steps) for trace in traces])
    losses = {n: 1.0 - v[:, -1] for n, v in shares.items()} if several else last
    about = table.about[found.report_name]
    out: dict[str, Any] = {
        "objectives": list(view.names),
        "choice": view.names[found.column],
        "report": found.report_name,
        "unit": about.unit,
        "how": about.how,
        "regret": {name: float(x.mean()) for name, x in last.items()},
        "test": {name: _plain(mean_band(found.shown(x + found.best))) for name, x in last.items()},
        "curves": {name: _curve(at, curve[:, at - 1]) for name, curve in curves.items()},
        "budgets": {name: _budgets(curve, found) for name, curve in curves.items()},
        "time": _times(runs, curves, found, view),
        "hypervolume": {name: _curve(steps, x) for name, x in shares.items()},
        "queries_to_best": {name: _to_best(traces, found) for name, traces in runs.items()},
        "judged_by": "hypervolume" if several else "regret",
        "ranks": significance.ranks(losses).to_json(),
        "significance": compared(losses),
        "improvement": _improvements(table, found, last),
        "ceiling": ceiling(table, found, several),
        "overhead_ms": {
            name: float(1e3 * np.mean([t.overhead / len(t) for t in traces]))
            for name, traces in runs.items()
        },
        "seconds_known": view.seconds is not None,
    }
    out["notes"] = _notes(table, view, runs, queries)
    out["verdicts"] = verdicts(out, queries, len(seeds))
    return out


def checkpoints(queries: int, points: int) -> Index:
    """Numbers of queries at which a curve is read: all where few, the usual budgets always."""
    even = np.unique(np.linspace(1, queries, min(points, queries)).round().astype(np.int64))
    usual = np.array([b for b in BUDGETS if b <= queries], dtype=np.int64)
    return np.union1d(even, usual)


def compared(losses: Mapping[str, Array], baseline: str = BASELINE) -> dict[str, Any]:
    """Every strategy against the baseline: the mean difference of losses (below 0 is better), its
    interval, p of the paired test, and p adjusted by Holm."""
    others = [name for name in losses if name != baseline]
    raw = {name: significance.paired(losses[name], losses[baseline]) for name in others}
    adjusted = significance.holm(raw)
    out = {}
    for name in others:
        gap = mean_band(losses[name] - losses[baseline])
        p = adjusted[name]
        out[name] = {
            **{f"difference_{k}" if k != "mean" else "difference": float(v)
               for k, v in gap._asdict().items()},
            "p": raw[name],
            "p_holm": p,
            "better": bool(p < significance.ALPHA and gap.mean < 0),
            "worse": bool(p < significance.ALPHA and gap.mean > 0),
        }  # fmt: skip
    return out


def _plain(band: Band) -> dict[str, Any]:
    return {k: np.asarray(v).tolist() for k, v in band._asdict().items()}


def _curve(at: Index, samples: Array) -> dict[str, Any]:
    return {"queries": at.tolist(), **_plain(mean_band(samples))}


def _budgets(curve: Array, found: Judge) -> dict[str, Any]:
    queries = curve.shape[1]
    out = {}
    for budget in [*(b for b in BUDGETS if b < queries), queries]:
        column = curve[:, budget - 1]
        test = found.shown(column + found.best)
        out[str(budget)] = {**_plain(mean_band(column)), "test": float(test.mean())}
    return out


def _times(
    runs: Mapping[str, Sequence[Trace]], curves: Mapping[str, Array], found: Judge, view: Told
) -> dict[str, Any]:
    """Regret over virtual time, on one grid that ends where the shortest strategy's runs end."""
    traces = [t for each in runs.values() for t in each]
    counted = all(np.array_equal(t.times, np.arange(1, len(t) + 1)) for t in traces)
    if view.seconds is None and counted:
        return {}  # a query is 1: the same picture as over queries
    end = min(float(np.mean([t.times[-1] for t in each])) for each in runs.values())
    grid = np.linspace(0.0, end, 81)[1:]
    before = found.worst - found.best
    out = {}
    for name, each in runs.items():
        read = [
            over_time(t.times, curve[: len(t)], grid, before)
            for t, curve in zip(each, curves[name], strict=True)
        ]
        out[name] = {"seconds": grid.tolist(), **_plain(mean_band(np.stack(read)))}
    return out


def _to_best(traces: Sequence[Trace], found: Judge) -> dict[str, Any]:
    numbers = np.array([queries_to_best(trace, found) for trace in traces])
    median = float(np.median(numbers))
    return {
        "median": median if np.isfinite(median) else None,
        "found": float(np.isfinite(numbers).mean()),
    }


def _improvements(table: Table, found: Judge, last: Mapping[str, Array]) -> dict[str, Any]:
    random = found.shown(found.report[found.kept])
    random = random[~np.isnan(random)]
    if len(random) < LEAST or random.mean() == 0:
        return {}
    out: dict[str, Any] = {
        name: _plain(improvement(found.shown(x + found.best), random, found.maximised))
        for name, x in last.items()
    }
    return {
        "random_average": float(random.mean()),
        "networks": len(random),
        "strategies": out,
    }


def _notes(
    table: Table, view: Told, runs: Mapping[str, Sequence[Trace]], queries: int
) -> list[str]:
    out = []
    for name, traces in runs.items():
        short = sum(len(t) < queries for t in traces)
        if short:
            out.append(
                f"{name} had nothing more to ask before {queries} queries in {short} of "
                f"{len(traces)} seeds; its last value is held."
            )
    predicted = sum(int((t.rows < 0).sum()) for each in runs.values() for t in each)
    if predicted:
        total = sum(len(t) for each in runs.values() for t in each)
        out.append(
            f"{predicted / total:.0%} of the queries were candidates that were not measured: the "
            "table predicted them."
        )
    return out
