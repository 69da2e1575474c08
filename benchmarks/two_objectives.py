"""Two objectives: accuracy against measured latency, perplexity against latency; hypervolume at 200 queries.

NAS-Bench-201 (CIFAR-100) with every measured device, HW-GPT-Bench (scale s) with every device. Espalier's
NSGA-II (population 20), guided search and random search beside Optuna's and pymoo's NSGA-II (population
20), one candidate at a time, 10 seeds. The front is chosen by validation and measured by test; the share
is of the table's own front, bounded by the worst of the table. For HW-GPT-Bench, whose 10,000 rows are a
sample of a far larger space, candidates that were not measured are predicted by the table's surrogate, and
shares are of the measured rows' front: they can exceed 1.

    python benchmarks/two_objectives.py --quick       # 3 seeds, 2 devices
    python benchmarks/two_objectives.py               # all devices
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from espalier.bench import tables
from espalier.bench.protocol import race
from espalier.bench.significance import holm, paired
from espalier.bench.table import Table
from espalier.flows.machine import machine
from peers.environments import PEERS

RESULTS = Path(__file__).parent / "results"
CACHE = Path(__file__).parents[1] / ".cache" / "two_objectives"
QUERIES = 200
TABLES = ("nb201:dataset=cifar100", "hw_gpt:scale=s")
OURS = ("random", "nsga2:population=20", "guided")
THEIRS = ("optuna-nsga2", "pymoo-nsga2")


def devices(table: Table) -> list[str]:
    """The latency columns of a table."""
    return [n for n, m in table.about.items() if n.startswith("lat") and m.unit == "ms"]


def raced(table: Table, device: str, seeds: int, queries: int) -> dict[str, Any]:
    """The hypervolume of every entrant, and ours against theirs."""
    objectives = [table.validation, device]
    given = [*OURS, *(PEERS[name].entrant(len(objectives)) for name in THEIRS)]
    folder = CACHE / f"{table.name.replace(':', '-')}-{device}-{queries}"
    found = race(table, given, queries, seeds, objectives=objectives, out=folder)
    result = found.to_json()
    return {
        name: {"mean": curve["mean"][-1], "low": curve["low"][-1], "high": curve["high"][-1]}
        for name, curve in result["hypervolume"].items()
    }


def summary(parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Over devices: the mean share of each entrant; how often ours is ahead, with a paired test
    over devices adjusted by Holm."""
    names = list(next(iter(parts.values())))
    shares = {n: np.array([p[n]["mean"] for p in parts.values()]) for n in names}
    tests = {
        f"{ours} less {theirs}": paired(shares[ours], shares[theirs])
        for ours in OURS[1:]
        for theirs in THEIRS
    }
    return {
        "mean": {n: float(x.mean()) for n, x in shares.items()},
        "ahead": {
            f"{ours} of {theirs}": f"{int((shares[ours] > shares[theirs]).sum())}/{len(parts)}"
            for ours in OURS[1:]
            for theirs in THEIRS
        },
        "p": holm(tests),
    }


def main() -> None:
    """Runs all devices and writes results/two_objectives.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--tables", default=";".join(TABLES), help="with ; between")
    args = parser.parse_args()
    queries, seeds = (60, 3) if args.quick else (QUERIES, args.seeds)
    started = time.time()
    found: dict[str, Any] = {"tables": {}}
    for name in args.tables.split(";"):
        table = tables.load(name)
        parts: dict[str, dict[str, Any]] = {}
        todo = devices(table)[:2] if args.quick else devices(table)
        for i, device in enumerate(todo):
            since = time.time()
            parts[device] = raced(table, device, seeds, queries)
            shown = "  ".join(f"{n} {x['mean']:.4f}" for n, x in parts[device].items())
            left = (time.time() - since) * (len(todo) - i - 1) / 60
            print(f"{name} {device}: {shown}  ({left:.0f} min left for this table)", flush=True)
        found["tables"][name] = {"devices": parts, **summary(parts)}
        print(json.dumps(found["tables"][name]["ahead"], indent=1))
    found.update(
        queries=queries,
        seeds=seeds,
        machine=machine(),
        seconds=time.time() - started,
        command="python benchmarks/two_objectives.py",
    )
    if not args.quick:
        (RESULTS / "two_objectives.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
