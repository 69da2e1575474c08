"""The solvers of `espalier.shrink` on one problem: half of ResNet-20's multiply-accumulates, by widths alone.

Each solver has the same seconds of the clock for everything up to the closed-form repair; then its network
is fine-tuned as in shrink_vs_peers.py, for the same processor time (what its repair took is taken off).
Beside them, from the first solver's run: one share for all widths, one threshold on the importance
of all channels, and the best of as many random candidates as its time allows, repaired and tuned the
same. The original is that of shrink_vs_peers.py, in its folder (tuned first where it is not there). Test
images are read by networks that are there, and told to nobody.

    python benchmarks/shrink_solvers.py [--seeds 5] [--budget 60] [--seconds 30]

Rows are written down as they come: a run that is stopped goes on, and runs of different seeds (`--first`) may
share a folder; the last of them sums up all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import espalier as esp
import shrink_vs_peers as peers
from espalier.errors import EspalierError
from espalier.flows.machine import machine
from espalier.tasks import Task
from espalier.train import evaluate
from shrinkers import Cut, Job

RESULT = Path(__file__).parent / "results" / "shrink_solvers.json"
SOLVERS = ("allocate", "search", "relax:dsa", "relax:pas", "relax:bip")
MODEL, SHARE, BASELINE = "resnet20", 0.5, 150.0
Row = dict[str, Any]


def shrunk(job: Job, solver: str, budget: float, baselines: bool) -> esp.Shrunk:
    """The answer of one solver, repaired in closed form alone."""
    out = job.folder / f"solvers-{solver.replace(':', '-')}-{job.seed}-{time.time_ns()}"
    return esp.shrink(
        job.original,
        job.task,
        within={"macs": f"{100 * SHARE:g}%"},
        budget=budget,
        decisions="width",
        solver=solver,
        tune=False,
        baselines=baselines,
        seed=job.seed,
        out=out,
    )


def networks(job: Job, solver: str, budget: float) -> Iterator[tuple[str, nn.Module, float, float]]:
    """A solver's network, and the baselines' with the first: their names, the seconds of their closed
    forms, and the time of the whole."""
    first = solver == SOLVERS[0]
    began = time.perf_counter()
    found = shrunk(job, solver, budget, first)
    spent = time.perf_counter() - began
    mended = {r["name"]: r["stages"][-1]["seconds"] for r in found.to_json()["shrink"]["repair"]}
    for entry in [found.best, *found.baselines]:
        own = entry.name == "shrunk" or entry.name.startswith("the answer of")
        yield (
            solver if own else entry.name,
            found.network(entry),
            mended.get(entry.name, 0.0),
            spent,
        )


def rows_of(job: Job, task: Task, solver: str, budget: float, seconds: float) -> Iterator[Row]:
    """What a solver led to, before and after the fine-tuning; a refusal is a row too."""
    row: Row = {"seed": job.seed}
    try:
        for name, network, mended, spent in networks(job, solver, budget):
            network, told = peers.tuned(job, Cut(network, 1.0, spent, mended=mended), seconds)
            test = evaluate(network, task, "test")["accuracy"]
            yield {**row, "solver": name, "seconds": spent, **told, "test": test}
    except EspalierError as error:
        yield {**row, "solver": solver, "refused": str(error)}


def summary(rows: list[Row]) -> list[Row]:
    """Mean and span over the seeds of each solver, the best on test first."""
    out = []
    for name in dict.fromkeys(r["solver"] for r in rows):
        own = [r for r in rows if r["solver"] == name and "test" in r]
        line: Row = {"solver": name, "seeds": len(own)}
        for key in ("validation_before", "validation", "test", "seconds") if own else ():
            values = [r[key] for r in own]
            line[key] = [statistics.mean(values), min(values), max(values)]
        out.append(line)
    return sorted(out, key=lambda line: -line.get("test", [0.0])[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=60.0, help="seconds up to the closed forms")
    parser.add_argument("--seconds", type=float, default=30.0, help="processor time of fine-tuning")
    parser.add_argument("--folder", type=Path, default=Path("runs/shrink_vs_peers"))
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    log = options.folder / "solvers.jsonl"
    task = peers.task_of(MODEL, peers.DATA[MODEL])
    blind = peers.without_test(task)
    original, _ = peers.original_of(MODEL, blind, BASELINE, options.folder)
    for seed in range(options.first, options.first + options.seeds):
        job = Job(MODEL, original, blind, seed, options.folder, 0.0)
        for solver in SOLVERS:
            if (seed, solver) in {(r["seed"], r["solver"]) for r in peers.written(log)}:
                continue
            # all at once: a solver is done or not
            made = list(rows_of(job, task, solver, options.budget, options.seconds))
            with log.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in made)
            print(*map(json.dumps, made), sep="\n", flush=True)
    rows = peers.written(log)
    settings = {"model": MODEL, "macs": SHARE, "budget": options.budget, "seconds": options.seconds}
    original_test = evaluate(original, task, "test")["accuracy"]
    settings |= {"machine": machine(), "original": original_test}
    found = {"settings": settings, "summary": summary(rows), "rows": rows}
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    for line in found["summary"]:
        print(json.dumps(line))


if __name__ == "__main__":
    main()
