"""Runs recipes' checks over seeds and keeps what they gave.

    python benchmarks/recipes.py fbnetv3 [gates ...] [--scale cpu] [--seeds 5] [--first 0]

Writes results/recipe_<name>.json beside this file: every seed's JSON, how many checks held, the
median and spread of every number in them. Seeds that the file holds already, of the same scale,
are kept and not run again unless --again is given. What recipes share (a search by
DARTS, say) is kept under .cache/recipes: remove it for runs that are new throughout. Without names every recipe is run once at the
smoke scale, and nothing is written.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from statistics import median, stdev
from typing import Any

from espalier import recipes
from espalier.errors import EspalierError

RESULTS = Path(__file__).parent / "results"
KEPT = Path(__file__).parents[1] / ".cache" / "recipes"  # searches that several recipes share


def numbers(data: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Every number in nested mappings, with its path; booleans as 0 and 1. Lists are left out."""
    if isinstance(data, dict):
        for key, value in data.items():
            yield from numbers(value, f"{path}.{key}" if path else str(key))
    elif isinstance(data, (bool, int, float)):
        yield path, float(data)


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Median, mean, standard deviation, least and greatest of the checks' numbers over seeds."""
    found: dict[str, list[float]] = {}
    for run in runs:
        for path, value in numbers(run["check"]):
            found.setdefault(path, []).append(value)
    return {
        path: {
            "median": median(values),
            "mean": sum(values) / len(values),
            "sd": stdev(values) if len(values) > 1 else 0.0,
            "min": min(values),
            "max": max(values),
        }
        for path, values in found.items()
    }


def kept(path: Path, scale: str) -> list[dict[str, Any]]:
    """The runs that a results file holds, if they are of this scale."""
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    return list(found["runs"]) if found["scale"] == scale else []


def write(path: Path, name: str, scale: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The file of one recipe."""
    runs = sorted(runs, key=lambda run: int(run["seed"]))
    verdicts = [bool(run["check"]["holds"]) for run in runs if "holds" in run["check"]]
    out = {
        "recipe": name,
        "scale": scale,
        "date": date.today().isoformat(),
        "machine": {
            "cores": os.cpu_count(),
            "machine": platform.machine(),
            "python": platform.python_version(),
        },
        "seeds": [run["seed"] for run in runs],
        "held": sum(verdicts),
        "judged": len(verdicts),
        "summary": summary(runs),
        "runs": runs,
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(out, indent=1) + "\n")
    return out


def run(name: str, scale: str, seed: int) -> dict[str, Any]:
    """One seed, with the seconds it took: of the wall's clock and of the processor."""
    start, cpu = time.monotonic(), time.process_time()
    # a study has a folder of its own; there is none where nothing is shared
    folder = None if name == "default-search" else KEPT / scale
    found = recipes.run(name, scale, seed, folder)
    spent = {"seconds": time.monotonic() - start, "cpu_seconds": time.process_time() - cpu}
    shown = json.dumps(found.get("check", {}))
    print(f"{name} seed {seed}: {spent['seconds']:.0f} s {shown[:2000]}", flush=True)
    return {**found, **{key: round(value, 1) for key, value in spent.items()}}


def main() -> None:
    """Every recipe that is named, seed after seed; written after each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="recipe")
    parser.add_argument("--scale", choices=recipes.SCALES, default="cpu")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--again", action="store_true")
    args = parser.parse_args()
    if not args.names:
        for name in recipes.names():
            try:
                run(name, "smoke", 0)
            except EspalierError as error:  # data or an extra that is not here
                print(f"{name}: {error}")
        return
    for name in args.names:
        recipes.find(name)  # a wrong name ends it here, with the nearest
        path = RESULTS / f"recipe_{name.replace('-', '_')}.json"
        runs = [] if args.again else kept(path, args.scale)
        for seed in range(args.first, args.first + args.seeds):
            if seed in [r["seed"] for r in runs]:
                continue
            runs.append(run(name, args.scale, seed))
            write(path, name, args.scale, runs)
        held, judged = sum(bool(r["check"].get("holds")) for r in runs), len(runs)
        print(f"{name}: the check held for {held} of {judged} seeds; wrote {path.name}")


if __name__ == "__main__":
    main()
