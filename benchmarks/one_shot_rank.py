"""How well one-shot estimates rank 200 cells of NAS-Bench-201, by how weights are shared.

    ESPALIER_DATA=... python benchmarks/one_shot_rank.py [--methods close ...] [--seeds 5]
        [--passes 6000] [--seconds 1500]

Every method trains a supernet at the same cost: as many passes (one subnet, one batch, forward and
backward), the same optimiser and schedule, on CIFAR-10 at 16x16 pixels; passes that find a split
count. Then 200 random cells, the same for all, are scored on validation images with the shared
weights, and Kendall's tau to the table's test and validation accuracy is taken. A row a method and
seed is written to results/one_shot_rank.json as soon as it is there; rows of the same settings that
the file holds are kept, so a run that was stopped goes on. Seeds go outside, methods inside: a run
that is stopped has compared all methods on the seeds that it finished. Nothing is started that would
not end within `--seconds`, going by the slowest row so far.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from espalier.bench.criteria import kendall
from espalier.recipes._parts import one_shot

RESULT = Path(__file__).parent / "results" / "one_shot_rank.json"
# in the order in which they run
METHODS = (
    "late",
    "one_block",
    "close",
    "split_by_gradients",
    "split_at_random",
    "uniform",
    "sandwich",
    "fair",
    "blocks_at_once",
    "one_block_split",
)
PLAN = replace(one_shot.PLANS["cpu"], passes=6000)


def kept(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that the file holds, if they are of these settings."""
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    return list(found["rows"]) if found["settings"] == settings else []


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread over seeds of each method, the best first; how often each beats each."""
    out: dict[str, Any] = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        out[method] = {"seeds": len(own)}
        for name in ("tau_test", "tau_validation", "seconds", "passes", "steps"):
            values = [row[name] for row in own]
            out[method][name] = mean(values)
            if name.startswith("tau"):
                out[method][f"{name}_sd"] = stdev(values) if len(values) > 1 else 0.0
        out[method]["wins_over"] = {
            other: _wins(own, [row for row in rows if row["method"] == other])
            for other in dict.fromkeys(row["method"] for row in rows)
            if other != method
        }
    return dict(sorted(out.items(), key=lambda item: -item[1]["tau_test"]))


def _wins(own: list[dict[str, Any]], other: list[dict[str, Any]]) -> str:
    """In how many of the seeds that both have the first ranks better, as "3 of 5"."""
    theirs = {row["seed"]: row["tau_test"] for row in other}
    both = [row for row in own if row["seed"] in theirs]
    return f"{sum(row['tau_test'] > theirs[row['seed']] for row in both)} of {len(both)}"


def counted(plan: one_shot.Plan) -> dict[str, float]:
    """What ranks for nothing: tau of multiply-accumulates; and tau of validation to test."""
    known = one_shot.truth(one_shot.cells(plan), plan)
    assert known is not None  # the table is here: main looked
    return {
        "macs": kendall(known["macs"], known["test"]),
        "table_validation": kendall(known["validation"], known["test"]),
    }


def write(settings: dict[str, Any], rows: list[dict[str, Any]], free: dict[str, float]) -> None:
    """The file, whole or not at all."""
    out = {
        "what": "Kendall's tau of one-shot accuracy to NAS-Bench-201, 200 cells, equal passes",
        "settings": settings,
        "machine": {
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
            "torch": torch.__version__,
        },
        "free": free,
        "summary": summary(rows),
        "rows": rows,
    }
    RESULT.parent.mkdir(exist_ok=True)
    beside = RESULT.with_suffix(".writing")
    beside.write_text(json.dumps(out, indent=1) + "\n")
    beside.replace(RESULT)


def main() -> None:
    """Seed after seed, method after method."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=one_shot.METHODS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--passes", type=int, default=PLAN.passes)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    args = parser.parse_args()
    plan = replace(PLAN, passes=args.passes)
    settings = asdict(plan)
    if one_shot.truth(one_shot.cells(plan), plan) is None:
        raise SystemExit("the table of NAS-Bench-201 is not here: set ESPALIER_DATA")
    rows, free = kept(RESULT, settings), counted(plan)
    start, slowest = time.monotonic(), 0.0
    for seed in range(args.first, args.first + args.seeds):
        for method in args.methods:
            if any(r["method"] == method and r["seed"] == seed for r in rows):
                continue
            if time.monotonic() - start + slowest > args.seconds:
                print(f"stopped before seed {seed} of {method}: run it again to go on")
                return
            began = time.monotonic()
            rows.append(one_shot.row(method, plan, seed))
            slowest = max(slowest, time.monotonic() - began)
            write(settings, rows, free)
            last = rows[-1]
            print(
                f"{seed} {method}: tau {last['tau_test']:.3f}, {last['seconds']:.0f} s", flush=True
            )


if __name__ == "__main__":
    main()
