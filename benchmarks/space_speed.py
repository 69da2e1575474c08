"""How long a million rows of 20 decisions take to be sampled, mutated and deduplicated.

    python benchmarks/space_speed.py [--rows 1000000] [--repeats 5]

Goal: under 2 seconds in total. Writes results/space_speed.json beside this file. For scale, a
plain-Python loop that does the same one candidate at a time runs over a small sample; it is our
own, not another package.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from espalier.space import Decision, Linear, Space, choice, integer, ordinal, real

GOAL_SECONDS = 2.0
RESULT = Path(__file__).parent / "results" / "space_speed.json"


def discrete() -> list[Decision]:
    """20 decisions of 2 to 6 options."""
    return [
        ordinal(f"width{i}", *range(16, 16 * (i % 5 + 3), 16))
        if i % 2
        else choice(f"op{i}", *range(i % 5 + 2))
        for i in range(20)
    ]


def conditional() -> list[Decision]:
    """5 stages of a depth and 3 kernels, each of which is active from its depth on."""
    return [
        d
        for s in range(5)
        for d in (
            integer(f"depth{s}", 1, 3),
            *(
                choice(f"kernel{s}.{b}", 3, 5, 7, when={f"depth{s}": range(b, 4)})
                for b in (1, 2, 3)
            ),
        )
    ]


def mixed() -> list[Decision]:
    """15 discrete decisions and 5 real ones."""
    return [*discrete()[:15], *(real(f"p{i}", 0.0, 1.0) for i in range(5))]


def spaces() -> dict[str, Space]:
    """The spaces that are timed."""
    widths = {f"width{i}": 1.0 for i in range(1, 20, 2)}
    return {
        "discrete": Space(discrete()),
        "conditional": Space(conditional()),
        "mixed": Space(mixed()),
        # the sum keeps about half of what is drawn
        "constrained": Space(discrete(), [Linear(widths, "<=", 440)]),
    }


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came out."""
    start = time.perf_counter()
    out = work()
    return time.perf_counter() - start, out


def once(space: Space, n: int, seed: int) -> dict[str, float]:
    """Seconds a step for n rows, those of the processor in all, and how many rows were left."""
    rng = np.random.default_rng(seed)
    before = time.process_time()
    sample, codes = timed(lambda: space.sample(n, rng))
    mutate, moved = timed(lambda: space.mutate(codes, rng))
    unique, first = timed(lambda: space.unique(moved))
    cpu = time.process_time() - before
    if not bool(space.valid(moved).all()):
        raise SystemExit("mutate gave rows that are not valid")
    total = sample + mutate + unique
    out = {"sample": sample, "mutate": mutate, "unique": unique, "total": total, "cpu": cpu}
    return {**out, "left": len(first)}


def one_at_a_time(space: Space, n: int, seed: int) -> float:
    """Seconds for n candidates in a plain loop over dictionaries, without conditions."""
    rng = random.Random(seed)
    options = {d.name: tuple(d.options) for d in space.decisions}
    start = time.perf_counter()
    seen = set()
    for _ in range(n):
        candidate = {name: rng.choice(known) for name, known in options.items()}
        for name, known in options.items():
            if rng.random() < 1 / len(options):
                candidate[name] = rng.choice([o for o in known if o != candidate[name]])
        seen.add(tuple(candidate.items()))
    return time.perf_counter() - start


def spread(values: list[float]) -> dict[str, float]:
    """Median, lowest and highest, in seconds."""
    return {k: round(f(values), 4) for k, f in (("median", median), ("min", min), ("max", max))}


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
        "system": platform.system(),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def main() -> None:
    """Times every space, prints a line each and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    result: dict[str, Any] = {
        "rows": args.rows,
        "decisions": 20,
        "repeats": args.repeats,
        "goal_seconds": GOAL_SECONDS,
        "machine": machine(),
        "spaces": {},
    }
    for name, space in spaces().items():
        once(space, 10_000, 0)  # first calls load code: not timed
        runs = [once(space, args.rows, seed) for seed in range(args.repeats)]
        steps = ("sample", "mutate", "unique", "total", "cpu")
        row: dict[str, Any] = {step: spread([r[step] for r in runs]) for step in steps}
        row["different_rows"] = int(median(r["left"] for r in runs))
        row["goal_kept"] = row["total"]["median"] < GOAL_SECONDS
        row["runs_within_goal"] = sum(r["total"] < GOAL_SECONDS for r in runs)
        result["spaces"][name] = row
        parts = ", ".join(f"{s} {row[s]['median']:.3f}" for s in steps)
        low, high = row["total"]["min"], row["total"]["max"]
        verdict = f"{row['runs_within_goal']} of {len(runs)} runs within {GOAL_SECONDS:g} s"
        print(f"{name:12} {parts} s (total {low:.3f} to {high:.3f}); {verdict}")
    few = min(args.rows, 5_000)
    loops = [one_at_a_time(spaces()["discrete"], few, seed) for seed in range(args.repeats)]
    scaled = [s * args.rows / few for s in loops]
    result["plain_python_loop"] = {
        "what": f"the discrete space, one candidate at a time in our own plain-Python loop, "
        f"timed over {few} candidates and scaled to {args.rows}",
        "total": spread(scaled),
    }
    ratio = median(scaled) / result["spaces"]["discrete"]["total"]["median"]
    print(
        f"plain-Python loop, scaled from {few}: {median(scaled):.1f} s, {ratio:.0f} times as long"
    )
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {RESULT.name}")


if __name__ == "__main__":
    main()
