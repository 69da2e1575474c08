"""Half of a mixture's experts: evolution with merging beside random, frequency-based and REAP pruning.

    python benchmarks/language_experts.py [--seeds 5] [--active 1]

The byte-level mixture of 8 experts a layer (3.3 million weights, trained here on the standard library's
source) keeps 4. Each seed draws its own calibration windows of the training text and its own held-out
windows of text that was never trained on. Evolution, random choices and pruning without merging ask for
the loss on the same windows equally often, all by inference alone; the 10 best of each are ranked again
on other windows. "eep" starts at random, as published; "informed" starts from what the router's
statistics (frequency, mean probability, REAP) choose, which read the same text. Every choice is judged
as it is, and with the experts' last maps fitted in closed form to what the layers gave (as
`espalier.compress.language.Experts` does). Rows are written to results/language_experts.json as they are made; a run that was
stopped goes on. The mixture is kept under .cache/recipes/cpu, and trained first where it is not there
(ten minutes on one idle core).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from espalier.recipes import eep
from espalier.recipes._parts import language

HERE = Path(__file__).parent
RESULT = HERE / "results" / "language_experts.json"
CACHE = HERE.parent / ".cache" / "recipes" / "cpu"
WAYS = ("informed", "eep", "prune only", "random", "frequency", "soft", "reap")


def main() -> None:
    """Runs the seeds that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--active", type=int, help="experts a token gets; as trained by default")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    setting = eep._SCALES["cpu"]
    model = language.byte_model("experts", 0, setting.steps, CACHE)
    found: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {"rows": []}
    for seed in range(given.seeds):
        done = [(r["seed"], r["active"]) for r in found["rows"]]
        if (seed, given.active) in done:
            continue
        start, used = time.perf_counter(), time.process_time()
        row = eep.compared(model, setting, seed, given.active)
        row |= {"seed": seed, "active": given.active}
        row |= {"seconds": time.perf_counter() - start, "cpu": time.process_time() - used}
        found["rows"].append(row)
        found["setting"] = {
            "experts": 8, "kept": setting.kept, "evaluations": row["evaluations"],
            "windows": setting.small, "windows_ranked_again": setting.dev,
            "windows_held_out": setting.held, "threads": given.threads,
        }  # fmt: skip
        found["summary"] = summary(found["rows"])
        RESULT.write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps({"seed": seed, **{n: w["held_out"] for n, w in row["ways"].items()}}))
    print(json.dumps(found.get("summary", {}), indent=1))


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each number of experts a token gets: mean and spread of each way in bits per byte of
    held-out text, as chosen and refitted, and in how many seeds informed evolution is better."""
    out = []
    for active in dict.fromkeys(row["active"] for row in rows):
        own = [row for row in rows if row["active"] == active]
        found: dict[str, Any] = {
            "active": active, "seeds": len(own), "original": _mean([r["original"] for r in own]),
        }  # fmt: skip
        for kind in ("held_out", "refitted"):
            bits = {n: [r["ways"][n][kind] for r in own] for n in WAYS}
            found[kind] = {
                "bits_per_byte": {n: _mean(b) for n, b in bits.items()},
                "spread": {n: _deviation(b) for n, b in bits.items()},
                "informed_better_in": _wins(bits["informed"], bits),
                "eep_better_in": _wins(bits["eep"], bits),
            }
        ours = [r["ways"]["informed"]["refitted"] for r in own]
        plain = {n: [r["ways"][n]["held_out"] for r in own] for n in WAYS}
        found["informed_refitted_better_than_plain_in"] = _wins(ours, plain)
        out.append(found)
    return out


def _wins(own: list[float], others: dict[str, list[float]]) -> dict[str, int]:
    return {n: sum(a < b for a, b in zip(own, b, strict=True)) for n, b in others.items()}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _deviation(values: list[float]) -> float:
    mean = _mean(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1))


if __name__ == "__main__":
    main()
