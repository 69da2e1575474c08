"""How fast strategies propose, and what a trial on record costs, beside other packages.

    python benchmarks/strategies_speed.py [--autodl CHECKOUT] [--awnas CHECKOUT] [--repeats 5]

Every package in the same run, its own process and environment (see peers/environments.py), one
thread, an objective that costs next to nothing: what is timed is asking and telling. Times are of
the processor, which other work on the machine disturbs least; those of the wall's clock stand
beside. `--autodl` is a checkout of github.com/D-X-Y/AutoDL-Projects, whose regularised evolution is
run as it is; `--awnas` one of github.com/walkerning/aw_nas, whose evolution knows the NAS-Bench-201
space. Writes results/strategies_speed.json beside this file.

Goals: 100 runs of 300 queries of regularised evolution (population 30, tournament 10, one at a time)
on a table of NAS-Bench-201's size in under 5 seconds; under 1 ms for a trial recorded on disk.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from espalier.problem import Metric, Problem, Reading
from espalier.solvers import strategies
from espalier.space import Candidate, Space, choice
from espalier.study import Serial, Study
from peers.environments import HERE, PACKAGES, python

RESULT = Path(__file__).parent / "results" / "strategies_speed.json"
GOAL_EVOLUTION, GOAL_TRIAL_MS = 5.0, 1.0
COUNTS = {"nb201": [5] * 6, "twenty": [2 + i % 5 for i in range(20)]}
BATCHES = (1, 20)
OURS = ("random", "grid", "local", "evolution", "nsga2", "eeea", "mcts", "reinforce", "guided")
PEERS = {
    "optuna-random": ("optuna", "random"),
    "optuna-tpe": ("optuna", "tpe"),
    "optuna-nsga2": ("optuna", "nsga2"),
    "pymoo-ga": ("pymoo", "ga"),
    "archai-random": ("archai", "random"),
    "archai-evolution": ("archai", "evolution"),
}
Times = list[dict[str, float]]


def space_of(counts: list[int]) -> Space:
    """Categorical decisions with so many options."""
    return Space([choice(f"x{i}", *range(n)) for i, n in enumerate(counts)])


def clocked(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds of the clock on the wall and of the processor."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def ours(name: str, counts: list[int], batch: int, queries: int, seed: int) -> dict[str, float]:
    """One run of a strategy."""
    space = space_of(counts)
    strategy = strategies.make(name, space, seed)
    slope = np.arange(1, len(counts) + 1, dtype=float)
    kept = np.zeros(batch)

    def work() -> None:
        for _ in range(queries // batch):
            codes = strategy.ask(batch)
            strategy.tell(codes, (codes @ slope)[:, None], kept[: len(codes)])

    return clocked(work)


def evolution(seeds: int, queries: int = 300) -> dict[str, float]:
    """Runs of regularised evolution on a table with a row for each of 15,625 candidates."""
    space = space_of(COUNTS["nb201"])
    table = np.random.default_rng(0).random((5**6, 1))
    radix = 5 ** np.arange(5, -1, -1)
    kept = np.zeros(1)

    def work() -> None:
        for seed in range(seeds):
            strategy = strategies.make("evolution", space, seed, population=30, sample=10)
            for _ in range(queries):
                codes = strategy.ask(1)
                strategy.tell(codes, table[codes @ radix], kept)

    return clocked(work)


def durable(trials: int, batch: int, seed: int, folder: str) -> dict[str, float]:
    """A study of random search on disk; each trial is on record before the next is asked for."""

    def evaluate(candidate: Candidate) -> dict[str, Reading]:
        total = sum(c * (i + 1) for i, c in enumerate(candidate.values()))  # type: ignore[operator]
        return {"loss": Reading(float(total))}

    strategy = strategies.make("random", space_of(COUNTS["nb201"]), seed)
    problem = Problem((Metric("loss"),))
    with (
        tempfile.TemporaryDirectory(dir=folder) as place,
        Study.create(Path(place) / "study", {"benchmark": "speed"}) as study,
    ):
        return clocked(
            lambda: study.search(
                "search", problem, strategy, evaluate, trials=trials, batch=batch, executor=Serial()
            )
        )


def peer(**request: Any) -> Times:
    """A peer's times. Errors: what the peer wrote, where it ends badly."""
    one = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
    own = {"archai": python("archai"), "awnas": Path(sys.executable)}
    place = own[request["kind"]] if request["kind"] in own else python("bayes")
    script = "awnas_peer.py" if request["kind"] == "awnas" else "speed_peer.py"
    done = subprocess.run(
        [str(place), str(HERE / script)],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env={**os.environ, **one},
    )
    if done.returncode:
        raise SystemExit(f"{request['kind']}: {done.stderr.strip().splitlines()[-1]}")
    found: Times = json.loads(done.stdout)
    return found


def row(times: Times, units: int) -> dict[str, float]:
    """Milliseconds a unit: median, least and greatest of the processor; median of the wall."""
    cpu = [t["cpu"] / units * 1e3 for t in times]
    wall = [t["wall"] / units * 1e3 for t in times]
    found = {"cpu_ms": median(cpu), "min": min(cpu), "max": max(cpu), "wall_ms": median(wall)}
    return {k: round(v, 4) for k, v in found.items()}


def proposals(repeats: int, queries: int, awnas: Path | None) -> dict[str, Any]:
    """Ask and tell of each strategy, in each space, in each batch size."""
    out: dict[str, Any] = {}
    for label, counts in COUNTS.items():
        for batch in BATCHES:
            here: dict[str, Any] = {}
            for name in OURS:
                ours(name, counts, batch, 40, 0)  # loads code: not counted
                times = [ours(name, counts, batch, queries, s) for s in range(repeats)]
                here[name] = row(times, queries)
            for name, (kind, method) in PEERS.items():
                times = peer(
                    kind=kind,
                    method=method,
                    counts=counts,
                    batch=batch,
                    queries=queries,
                    repeats=repeats,
                )
                here[name] = row(times, queries)
            if awnas and label == "nb201":
                times = peer(
                    kind="awnas",
                    checkout=str(awnas.resolve()),
                    batch=batch,
                    queries=queries,
                    repeats=repeats,
                )
                here["awnas-evolution"] = row(times, queries)
            out[f"{label}, batch {batch}"] = here
            for name, found in here.items():
                rate = 1e3 / found["cpu_ms"]
                print(f"{label} batch {batch:2} {name:14} {found['cpu_ms']:8.3f} ms {rate:9.0f}/s")
    return out


def records(repeats: int, trials: int) -> dict[str, Any]:
    """What a trial on record costs."""
    out: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=Path(__file__).parent) as folder:
        for batch in BATCHES:
            durable(20, batch, 0, folder)
            times = [durable(trials, batch, s, folder) for s in range(repeats)]
            out[f"espalier, batch {batch}"] = row(times, trials)
        few = max(trials // 4, 1)  # they take long
        for method in ("sqlite", "journal"):
            times = peer(
                kind="optuna-durable",
                method=method,
                counts=COUNTS["nb201"],
                queries=few,
                repeats=repeats,
                folder=folder,
            )
            out[f"optuna {method}"] = row(times, few)
    for name, found in out.items():
        print(
            f"a trial on record, {name:20} {found['cpu_ms']:7.3f} ms, wall {found['wall_ms']:.3f}"
        )
    return out


def machine() -> dict[str, Any]:
    """What it ran on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def main() -> None:
    """Times everything, prints a line each and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--autodl", type=Path, help="a checkout of AutoDL-Projects")
    parser.add_argument("--awnas", type=Path, help="a checkout of aw_nas")
    args = parser.parse_args()
    result: dict[str, Any] = {
        "queries": args.queries,
        "repeats": args.repeats,
        "machine": machine(),
        "peers": list(PACKAGES["bayes"]),
        "goals": {"evolution_seconds": GOAL_EVOLUTION, "trial_ms": GOAL_TRIAL_MS},
    }
    evolution(1)
    runs = {"espalier": [evolution(100) for _ in range(args.repeats)]}
    if args.autodl:
        few = 10
        found = peer(
            kind="autodl",
            checkout=str(args.autodl.resolve()),
            seeds=few,
            queries=300,
            repeats=args.repeats,
        )
        runs["autodl-projects"] = [{k: v * 100 / few for k, v in t.items()} for t in found]
    # in seconds: a thousand of a unit's milliseconds
    result["regularised_evolution_100_runs_of_300"] = {
        name: {k.replace("_ms", "_seconds"): v for k, v in row(times, 1000).items()}
        for name, times in runs.items()
    }
    for name, times in runs.items():
        cpu = [t["cpu"] for t in times]
        print(
            f"100 runs of 300 queries, {name}: {median(cpu):.2f} s ({min(cpu):.2f} to {max(cpu):.2f})"
        )
    result["records"] = records(args.repeats, args.queries)
    result["ask_and_tell_ms"] = proposals(args.repeats, args.queries, args.awnas)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {RESULT.name}")


if __name__ == "__main__":
    main()
