"""What one call of `espalier.shrink` gives, all settings at their defaults: the time it takes and what fits.

Half of the latency, a budget of minutes, everything else as it comes: table, sensitivities, program,
repair, baselines, test, export and report. For each subject and budget: the seconds of the clock
from call to answer against the budget, the latency that the answer was measured at and that it has
when it is timed once more beside the original, and the accuracies on test images, which the shrink
reads once.

- resnet20, resnet56, mobilenet: the originals of shrink_vs_peers.py, in its folder (tuned first where
  they are not there).
- large: ResNet-50 at 224x224 (transformers, weights at random, 96 images for training): its answer says
  nothing, its time does. Left out where transformers is not installed.

    python benchmarks/shrink_default.py [--subjects resnet20 large] [--budgets 120 300] [--seeds 5]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import espalier as esp
import shrink_vs_peers as peers
from espalier.errors import EspalierError
from espalier.flows.machine import machine
from espalier.tasks import Task
from espalier.train.seeds import global_seed
from shrinkers import Job

RESULT = Path(__file__).parent / "results" / "shrink_default.json"
BASELINE = {"resnet20": 150.0, "resnet56": 300.0, "mobilenet": 600.0}
LARGE = "cifar10:size=224,train=96,validation=64,test=64"
SHARE = 0.5


def large() -> tuple[nn.Module, Task]:
    """ResNet-50 as its users hold it, for images of 224x224."""
    from transformers import ResNetConfig, ResNetForImageClassification

    with global_seed(0):
        model = ResNetForImageClassification(ResNetConfig(num_labels=10))
    return model.eval(), esp.tasks.make(LARGE)


def subject(name: str, folder: Path) -> tuple[nn.Module, Task]:
    """A trained model and its task; the test images are the task's own, as a user's are."""
    if name == "large":
        return large()
    task = peers.task_of(name, peers.DATA[name])
    blind = peers.without_test(task)
    return peers.original_of(name, blind, BASELINE[name], folder)[0], task


def one(name: str, model: nn.Module, task: Task, budget: float, seed: int, folder: Path) -> Any:
    """One shrink; a refusal is a row too."""
    out = folder / f"default-{name}-{budget:g}-{seed}-{time.time_ns()}"
    row: dict[str, Any] = {"subject": name, "budget": budget, "seed": seed}
    start = time.perf_counter()
    try:
        shrunk = esp.shrink(
            model,
            task,
            within={"latency_ms": f"{100 * SHARE:g}%"},
            budget=budget,
            seed=seed,
            out=out,
        )
        shrunk.publish()
    except EspalierError as error:
        return row | {"seconds": time.perf_counter() - start, "refused": str(error)}
    row["seconds"] = time.perf_counter() - start
    best, original = shrunk.best.metrics, shrunk.original.metrics
    told = shrunk.to_json()
    job = Job(name, model, task, seed, folder, 0.0)
    return row | {
        "best": shrunk.best.name,
        "share_measured": best["latency_ms"].value / original["latency_ms"].value,
        "share_again": job.ratio(shrunk.network()),
        "accuracy": best["accuracy"].value,
        "accuracy_original": original["accuracy"].value,
        "solver": told["shrink"]["solver"],
        "baselines": {
            e.name: {
                "accuracy": e.metrics["accuracy"].value,
                "share": e.metrics["latency_ms"].value / original["latency_ms"].value,
            }
            for e in shrunk.baselines
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", nargs="*", default=[*BASELINE, "large"])
    parser.add_argument("--budgets", nargs="*", type=float, default=[120.0, 300.0])
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("runs/shrink_vs_peers"))
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    log = options.folder / "default.jsonl"
    for name in options.subjects:
        if name == "large" and importlib.util.find_spec("transformers") is None:
            print("large is left out: transformers is not installed", flush=True)
            continue
        model, task = subject(name, options.folder)
        for budget in options.budgets:
            for seed in range(options.first, options.first + options.seeds):
                key = (name, budget, seed)
                if key in {(r["subject"], r["budget"], r["seed"]) for r in peers.written(log)}:
                    continue
                row = one(name, model, task, budget, seed, options.folder)
                with log.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
    settings = {"share": SHARE, "threads": torch.get_num_threads(), "machine": machine()}
    found = {"settings": settings, "rows": peers.written(log)}
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
