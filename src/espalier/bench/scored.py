"""The runs of a race read by one protocol: every figure of the page, as plain JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.bench import significance
from espalier.bench.bootstrap import Band, mean_band
from espalier.bench.ceiling import ceiling
from espalier.bench.entrants import BASELINE
from espalier.bench.improvement import LEAST, improvement
from espalier.bench.regret import Judge, held, over_time, queries_to_best, regret
from espalier.bench.stages import FIDELITIES, Stage
from espalier.bench.told import Told
from espalier.bench.trace import Trace
from espalier.bench.verdicts import verdicts
from espalier.bench.volume import rescaled, share, volume

Array = NDArray[np.float64]
Index = NDArray[np.int64]

BUDGETS = (10, 25, 50, 100, 150, 200, 300, 500, 1000)
_POINTS = 150  # of a curve in the JSON
_VOLUMES = 40  # hypervolumes are dearer


def scored(
    plain: Stage,
    on: Mapping[str, Stage],
    runs: Mapping[str, Sequence[Trace]],
    seeds: Sequence[int],
    queries: int,
    workers: int = 1,
) -> dict[str, Any]:
    """Scores every strategy alike; see `Race.to_json` for what is in it. `on` is the stage of each
    strategy: where that has a budget in time, q queries are the time of q average trainings."""
    table, view, found = plain.table, plain.view, plain.judge
    at = checkpoints(queries, _POINTS)
    read = {
        name: [_read(trace, on[name], found, queries, workers) for trace in traces]
        for name, traces in runs.items()
    }
    curves = {name: np.stack([r.curve for r in each]) for name, each in read.items()}
    last = {name: curve[:, -1] for name, curve in curves.items()}
    several = len(view.names) > 1
    steps = checkpoints(queries, _VOLUMES)
    shares: dict[str, Array] = {}
    if several:
        base = volume(table, view)
        for name, traces in runs.items():
            space = base if on[name] is plain else rescaled(on[name].table, on[name].view, base)
            shares[name] = np.stack(
                [
                    share(trace, space, r.spent[steps - 1])
                    for trace, r in zip(traces, read[name], strict=True)
                ]
            )
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
        "time": _times(runs, read, found, view),
        "hypervolume": {name: _curve(steps, x) for name, x in shares.items()},
        "queries_to_best": {name: _to_best(each) for name, each in read.items()},
        "judged_by": "hypervolume" if several else "regret",
        "ranks": significance.ranks(losses).to_json(),
        "significance": compared(losses),
        "improvement": _improvements(found, last),
        "ceiling": ceiling(table, found),
        "overhead_ms": {
            name: float(1e3 * np.mean([t.overhead / len(t) for t in traces]))
            for name, traces in runs.items()
        },
        "seconds_known": view.seconds is not None,
        "in_time": [name for name in runs if on[name].second is not None],
    }
    out["notes"] = _notes(on, runs, queries)
    out["verdicts"] = verdicts(out, queries, len(seeds))
    return out


@dataclass(frozen=True)
class _Read:
    """One run: regret after each of its own queries and at the race's count `(queries,)`; how many
    of its own queries were `spent` by then; the race's count at which the best was found."""

    own: Array
    curve: Array
    spent: Index
    to_best: float


def _read(trace: Trace, stage: Stage, found: Judge, queries: int, workers: int) -> _Read:
    count = np.arange(1, queries + 1)
    to_best = queries_to_best(trace, stage.judge)
    if stage.second is None:
        own = regret(trace, found)
        return _Read(own, held(own, queries), np.minimum(count, len(trace)), to_best)
    # the best of the table with whole trainings is what is compared with, also here
    mine = stage.judge
    own = np.maximum(regret(trace, mine) + mine.best - found.best, 0.0)
    grid = count * stage.second / workers
    curve = over_time(trace.times, own, grid, found.worst - found.best)
    spent = np.searchsorted(trace.times, grid, side="right")
    if np.isfinite(to_best):
        to_best = float(trace.times[int(to_best) - 1] / stage.second * workers)
    return _Read(own, curve, spent, to_best)


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
    runs: Mapping[str, Sequence[Trace]],
    read: Mapping[str, Sequence[_Read]],
    found: Judge,
    view: Told,
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
        curves = [
            over_time(t.times, r.own, grid, before) for t, r in zip(each, read[name], strict=True)
        ]
        out[name] = {"seconds": grid.tolist(), **_plain(mean_band(np.stack(curves)))}
    return out


def _to_best(read: Sequence[_Read]) -> dict[str, Any]:
    numbers = np.array([r.to_best for r in read])
    median = float(np.median(numbers))
    return {
        "median": median if np.isfinite(median) else None,
        "found": float(np.isfinite(numbers).mean()),
    }


def _improvements(found: Judge, last: Mapping[str, Array]) -> dict[str, Any]:
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


def _notes(on: Mapping[str, Stage], runs: Mapping[str, Sequence[Trace]], queries: int) -> list[str]:
    out = []
    for name, traces in runs.items():
        short = sum(len(t) < queries for t in traces)
        if on[name].second is not None:
            asked = float(np.mean([len(t) for t in traces]))
            out.append(
                f"{name} stops trainings early: it spent the virtual time of {queries} average "
                f"trainings on {asked:.0f} candidates and levels a run; where others have made q "
                "queries it is read at the time of q average trainings."
            )
        elif short:
            out.append(
                f"{name} had nothing more to ask before {queries} queries in {short} of "
                f"{len(traces)} seeds; its last value is held."
            )
        if name.split(":")[0] in FIDELITIES and on[name].second is None:
            out.append(
                f"{name}: the table has no learning curves, so there is one level and nothing to "
                "stop early."
            )
    predicted = sum(int((t.rows < 0).sum()) for each in runs.values() for t in each)
    if predicted:
        total = sum(len(t) for each in runs.values() for t in each)
        out.append(
            f"{predicted / total:.0%} of the queries were candidates that were not measured: the "
            "table predicted them."
        )
    return out
