"""Multi-fidelity strategies on learning curves: test regret at equal virtual time.

On tables with curves, asynchronous workers in virtual time (`bench.virtual`): random search that
trains every candidate to the end, successive halving, Hyperband, ASHA and BOHB, with 1, 4 and 16
workers. All get the same compute: that of `--trainings` full trainings of average length, divided by
the workers. A promoted candidate pays the additional epochs only.

Chosen: what has the best validation at any level so far. Regret is against the best test result of
the table at any level, in the table's unit, in two readings: "in_hand", of the network as it was
trained when it was chosen; "trained_on", of that candidate after all epochs (whose time is not
counted). Each is a mean over seeds with a bootstrap interval, at shares of the time; null where some
run had no result yet. `p` is the paired sign-flip test against random search at the end, by
Holm's step-down over the strategies.

    ESPALIER_DATA=... python benchmarks/fidelity.py                 # every table at hand, 30 seeds
    ESPALIER_DATA=... python benchmarks/fidelity.py --tables nb_nlp --seeds 5
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.bench import tables
from espalier.bench.bootstrap import mean_band
from espalier.bench.curves import with_epochs
from espalier.bench.regret import chosen, judge, over_time
from espalier.bench.significance import holm, paired
from espalier.bench.table import Table
from espalier.bench.told import told
from espalier.bench.virtual import simulate
from espalier.errors import EspalierError
from espalier.flows.machine import machine
from espalier.solvers import strategies

RESULTS = Path(__file__).parent / "results" / "fidelity.json"
LEVELS = {"nb_nlp": (2, 6, 17, 50), "digits": (1, 3, 9)}
NAMES = ("random", "halving", "hyperband", "asha", "bohb")
WORKERS = (1, 4, 16)
SHARES = (0.125, 0.25, 0.5, 1.0)

Array = NDArray[np.float64]


def run(table: Table, seeds: int, trainings: int) -> dict[str, Any]:
    """All strategies with all numbers of workers on one table."""
    levels = LEVELS[table.name]
    few, full = with_epochs(table, levels), with_epochs(table, levels[-1:])
    view, whole = told(few), told(full)
    referee = judge(few, view)
    top = len(levels) - 1
    end = trainings * float(np.nanmean(full.epoch_seconds))
    out: dict[str, Any] = {}
    for workers in WORKERS:
        seconds = end / workers
        grid = seconds * np.array(SHARES)
        found: dict[str, Any] = {}
        finals: dict[str, Array] = {}
        for name in NAMES:
            began = time.perf_counter()
            hand, later, queries = [], [], []
            for seed in range(seeds):
                plain = name == "random"
                each, seen = (full, whole) if plain else (few, view)
                strategy = strategies.make(name, each.space, seed)
                trace = simulate(strategy, each, workers=workers, seconds=seconds, seen=seen)
                if plain:  # the same rows in the table of all levels
                    rows = trace.rows * len(levels) + top
                    trace = type(trace)(rows, trace.values, trace.violations, trace.times)
                pick = chosen(trace, referee)
                rows = trace.rows[np.maximum(pick, 0)]
                lost = [referee.report[r] for r in (rows, rows // len(levels) * len(levels) + top)]
                for curves, report in zip((hand, later), lost, strict=True):
                    curve = np.where(pick < 0, np.nan, report - referee.best)
                    curves.append(over_time(trace.times, curve, grid, np.nan))
                queries.append(len(trace))
            finals[name] = np.array(hand)[:, -1]
            found[name] = {
                "in_hand": _bands(np.array(hand)),
                "trained_on": _bands(np.array(later)),
                "results": float(np.mean(queries)),
                "real_seconds_a_run": round((time.perf_counter() - began) / seeds, 3),
            }
        others = [name for name in NAMES if name != "random"]
        p = holm({name: paired(finals[name], finals["random"]) for name in others})
        for name in others:
            found[name]["p"] = round(p[name], 5)
            found[name]["share_of_random"] = round(
                float(finals[name].mean() / finals["random"].mean()), 3
            )
        out[f"{workers} workers"] = {"virtual_seconds": round(seconds, 2), "strategies": found}
        _show(table.name, workers, found)
    unit = table.about[table.test].unit
    return {
        "levels": levels,
        "candidates": len(table),
        "trainings": trainings,
        "seeds": seeds,
        "unit": unit,
        "perfect_choice": round(float(referee.report[referee.winner] - referee.best), 5),
        "random_candidate": round(float(np.nanmean(judge(full, whole).report) - referee.best), 5),
        "shares_of_time": SHARES,
        "workers": out,
    }


def _bands(curves: Array) -> list[list[float] | None]:
    """Mean, low and high at each share; None where some run had nothing."""
    out: list[list[float] | None] = []
    for column in curves.T:
        if np.isnan(column).any():
            out.append(None)
        else:
            out.append([round(float(x), 5) for x in mean_band(column)])
    return out


def _show(table: str, workers: int, found: dict[str, Any]) -> None:
    for name, result in found.items():
        shown = "  ".join("   -  " if b is None else f"{b[0]:.4f}" for b in result["in_hand"])
        later = result["trained_on"][-1][0]
        print(
            f"{table} {workers:2d} workers {name:10s} {shown}  trained on {later:.4f}", flush=True
        )


def main() -> None:
    """Runs and writes the results; a table that is not at hand is said and left out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", default=",".join(LEVELS))
    parser.add_argument("--seeds", type=int, default=30)
    parser.add_argument("--trainings", type=int, default=64)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    out = json.loads(given.out.read_text()) if given.out.exists() else {"tables": {}}
    for name in given.tables.split(","):
        try:
            table = tables.load(name)
        except EspalierError as error:
            print(f"{name} is left out: {error}")
            continue
        out["tables"][name] = run(table, given.seeds, given.trainings)
        out["machine"] = machine()
        given.out.parent.mkdir(exist_ok=True)
        given.out.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
