"""How fast whole arrays of codes are priced, once tables are warm, against building and counting.

python benchmarks/costs_speed.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import espalier as esp
from espalier.costs import Counts, OnnxRuntime, PredictedLatency, count, machine
from espalier.costs.timing import Timing

RESULT = Path(__file__).parent / "results" / "costs_speed.json"
GOAL_SECONDS = 1.0  # for 100,000 rows


class Instant(OnnxRuntime):
    """Measures nothing: only the pricing afterwards is timed here."""

    def quick(self, model: Any, example: Any = None, least_seconds: float = 0.0) -> Timing:
        ms = len(model) * 1e-6
        return Timing(ms, ms, ms, 0.0, 1, 1, 1, 0.0)


def timed(run: Callable[[], object], repeats: int) -> dict[str, float]:
    """Seconds of one call: median, least, greatest."""
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return {"median": statistics.median(found), "min": min(found), "max": max(found)}


def once(name: str, shape: tuple[int, ...], rows: int, repeats: int) -> dict[str, Any]:
    """Warm and cold prices of one family."""
    family = esp.nets.make(name, shape, 10)
    codes = family.space.sample(rows, np.random.default_rng(0))
    start = time.perf_counter()
    counts = Counts(family)
    counts.estimate_codes(codes)
    cold = time.perf_counter() - start
    predicted = PredictedLatency(family, Instant())
    predicted.calibrate(limit=40)
    predicted.estimate_codes(codes)
    candidates = family.space.decode(codes[:20])
    naive = timed(lambda: [count(family.build(c), family.example()) for c in candidates], repeats)
    return {
        "counts_seconds": timed(lambda: counts.estimate_codes(codes), repeats),
        "predicted_seconds": timed(lambda: predicted.estimate_codes(codes), repeats),
        "cold_tables_seconds": cold,
        "build_and_count_seconds_a_candidate": naive["median"] / len(candidates),
    }


def main() -> None:
    """Times both families, prints a line each and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "rows": args.rows,
        "repeats": args.repeats,
        "goal_seconds": GOAL_SECONDS,
        "processor": machine.processor(),
        "load_before": round(machine.load_now(1.0), 2),
        "families": {},
    }
    for name, shape in (("mobilenet", (3, 32, 32)), ("resnet", (3, 32, 32))):
        row = once(name, shape, args.rows, args.repeats)
        row["goal_kept"] = row["counts_seconds"]["max"] < GOAL_SECONDS
        result["families"][name] = row
        naive = row["build_and_count_seconds_a_candidate"]
        print(
            f"{name:10} {args.rows} rows: counts {row['counts_seconds']['median']:.3f} s, "
            f"predicted latency {row['predicted_seconds']['median']:.3f} s; "
            f"tables made in {row['cold_tables_seconds']:.1f} s; building and counting each "
            f"network {naive * 1e3:.0f} ms a candidate ({naive * args.rows:.0f} s for all)"
        )
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {RESULT.name}")


if __name__ == "__main__":
    main()
