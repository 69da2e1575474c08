"""Predictor-guided search beside random search and regularised evolution, on tables of trained networks.

Test accuracy of the best validation row after 25, 50, 100, 150 and 300 queries, one query at a time,
on NAS-Bench-201 (CIFAR-10, CIFAR-100) and NAS-Bench-Macro; how many queries it takes until the best
validation row is found; seconds of the strategy a run. Evolution has a population of 30 and a
tournament of 10. Goal: guided is the best at every budget, reaches at 50 queries what evolution
reaches at 150, and finds the best validation cell in a median of at most 100 queries on CIFAR-10
and 40 on CIFAR-100.

    ESPALIER_DATA=... python benchmarks/guided_search.py [--seeds 100] [--tables nb_macro] [--only guided]

Needs `espalier[tables]`. Writes results/guided_search.json beside this file: the figures, and of each
seed the test accuracies and the number of queries to the best row. What a run does not cover is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from espalier.bench import tables
from espalier.bench.drive import drive
from espalier.bench.table import Table
from espalier.bench.told import told
from espalier.solvers.strategies import Strategy, make

RESULT = Path(__file__).parent / "results" / "guided_search.json"
BUDGETS = (25, 50, 100, 150, 300)
TABLES = ("nb201:dataset=cifar10", "nb201:dataset=cifar100", "nb_macro")
GOALS = {"nb201:dataset=cifar10": 100, "nb201:dataset=cifar100": 40}  # queries to the best row

STRATEGIES: dict[str, Callable[[Table, int], Strategy]] = {
    "random": lambda table, seed: make("random", table.space, seed),
    "evolution": lambda table, seed: make("evolution", table.space, seed, population=30, sample=10),
    "guided": lambda table, seed: make("guided", table.space, seed, features=table.encode),
    "guided, one-hot only": lambda table, seed: make("guided", table.space, seed),
    "BANANAS": lambda table, seed: bananas(table, seed),
}


def bananas(table: Table, seed: int) -> Strategy:
    """The choice of slots of BANANAS: path encoding, networks, Thompson sampling, mutations."""
    from espalier.estimators.predictors.features import Paths

    assert table.graphs is not None
    return make(
        "guided",
        table.space,
        seed,
        features=Paths(table.graphs),
        regressor="mlp",
        acquisition="thompson",
        proposals="mutations",
    )


def measured(table: Table, begin: Callable[[Table, int], Strategy], seeds: int) -> dict[str, Any]:
    """Every seed's test values at the budgets, and its queries to the best row (null: not found)."""
    view = told(table)
    validation, test = table.columns[table.validation], table.columns[table.test]
    accuracies, found, seconds = [], [], []
    for seed in range(seeds):
        start = time.process_time()
        rows = drive(begin(table, seed), table, BUDGETS[-1], seen=view).rows
        seconds.append(time.process_time() - start)
        accuracies.append([float(test[rows[:b][np.argmax(validation[rows[:b]])]]) for b in BUDGETS])
        hit = np.flatnonzero(rows == table.best())
        found.append(int(hit[0]) + 1 if len(hit) else None)
    values = np.array(accuracies)
    queries = [np.inf if f is None else f for f in found]
    middle = float(np.median(queries))
    return {
        "seeds": seeds,
        "test": {str(b): round(float(m), 4) for b, m in zip(BUDGETS, values.mean(0), strict=True)},
        "standard_error": {
            str(b): round(float(s / np.sqrt(seeds)), 4)
            for b, s in zip(BUDGETS, values.std(0, ddof=1), strict=True)
        },
        "median_queries_to_best": None if np.isinf(middle) else middle,
        "found_best": float(np.mean(np.isfinite(queries))),
        "seconds_a_seed": round(float(np.mean(seconds)), 3),
        "each_seed": {"test": np.round(values, 4).tolist(), "queries_to_best": found},
    }


def checked(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    """Whether the goals hold on one table, of what was measured there."""
    rows = entry["strategies"]
    if not {"guided", "evolution", "random"} <= set(rows):
        return {}
    others = [rows["random"], rows["evolution"]]
    mine = rows["guided"]
    out: dict[str, Any] = {
        "best_at": [b for b in mine["test"] if all(mine["test"][b] > o["test"][b] for o in others)],
        "guided_50_minus_evolution_150": round(
            mine["test"]["50"] - rows["evolution"]["test"]["150"], 4
        ),
    }
    if name in GOALS:
        median = mine["median_queries_to_best"]
        out["median_goal"] = GOALS[name]
        out["median_kept"] = median is not None and median <= GOALS[name]
    return out


def main() -> None:
    """Measures what is asked for, and puts it into the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--tables", default=";".join(TABLES), help="separated by semicolons")
    parser.add_argument("--only", default="random;evolution;guided", help="the same")
    given = parser.parse_args()
    for name in given.tables.split(";"):
        table = tables.load(name)
        for strategy in given.only.split(";"):
            row = measured(table, STRATEGIES[strategy], given.seeds)
            result = json.loads(RESULT.read_text()) if RESULT.exists() else {"tables": {}}
            result["machine"] = {"cpus": os.cpu_count(), "python": platform.python_version()}
            entry = result["tables"].setdefault(name, {"strategies": {}})
            entry["of_best_validation"] = float(table.columns[table.test][table.best()])
            entry["best_test"] = float(np.max(table.columns[table.test]))
            entry["strategies"][strategy] = row
            entry["check"] = checked(name, entry)
            RESULT.write_text(json.dumps(result, indent=1) + "\n")
            shown = " ".join(
                f"{row['test'][str(b)]:.2f}±{row['standard_error'][str(b)]:.2f}" for b in BUDGETS
            )
            print(
                f"{name:24} {strategy:20} {shown}  best row after {row['median_queries_to_best']} "
                f"(found in {row['found_best']:.0%}), {row['seconds_a_seed']} s a seed",
                flush=True,
            )


if __name__ == "__main__":
    main()
