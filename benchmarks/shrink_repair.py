"""What a cut network should start fine-tuning from: statistics alone, or least squares and how held back.

ResNet-20 and the MobileNet of shrink_vs_peers.py with every width cut to a share. Each start is
fine-tuned for the same processor time: short, as in a shrink of a minute, and long. `ridge` holds
the least squares around the weights as cut. Accuracy and loss are those of validation: nothing here
is tested.

    python benchmarks/shrink_repair.py [--models resnet20 mobilenet] [--seeds 5] [--seconds 6 45]

The originals are those of shrink_vs_peers.py, in its folder; they are tuned first if they are not there.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import nn

import shrink_vs_peers as peers
from espalier.compress.repair import reconstruct
from espalier.flows.machine import machine
from espalier.train import evaluate, recalibrate
from shrinkers import Cut, Job, Uniform

RESULT = Path(__file__).parent / "results" / "shrink_repair.json"
STARTS = ("statistics", 0.01, 0.1, 0.3, 1.0)  # and least squares by ridge
AMOUNTS = (0.75, 0.5)  # of every width
EXAMPLES = 512
BASELINE = {"resnet20": 150.0, "mobilenet": 600.0}


def started(job: Job, cut: nn.Module, start: str | float) -> nn.Module:
    """The cut network in one of the states that fine-tuning may start from."""
    network = copy.deepcopy(cut)
    if isinstance(start, str):
        recalibrate(network, job.task, seed=job.seed)
    else:
        order = torch.Generator().manual_seed(job.seed)
        x, _ = next(iter(job.task.batches("train", EXAMPLES, order)))
        reconstruct(network, job.original, x, ridge=start, seed=job.seed)
    return network


def rows_of(job: Job, amount: float, times: list[float], log: Path) -> None:
    """Every start at every length of one cut; each is written down as soon as it is there."""
    done = {
        (r["model"], r["seed"], r["amount"], r["start"], r["seconds"]) for r in peers.written(log)
    }
    cut = Uniform(job, 8).cut(amount)
    for start in STARTS:
        for seconds in times:
            if (job.name, job.seed, amount, start, seconds) in done:
                continue
            network = started(job, cut, start)
            before = evaluate(network, job.task, "validation")
            network, found = peers.tuned(job, Cut(network, 1.0, 0.0), seconds)
            after = evaluate(network, job.task, "validation")
            row = {
                "model": job.name, "seed": job.seed, "amount": amount, "start": start,
                "seconds": seconds, "steps": found["steps"], "before": before, "after": after,
            }  # fmt: skip
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean accuracy and loss over seeds, before and after, of each start."""
    keys = ("model", "amount", "seconds", "start")
    out = []
    for told in dict.fromkeys(tuple(r[k] for k in keys) for r in rows):
        own = [r for r in rows if tuple(r[k] for k in keys) == told]
        line: dict[str, Any] = {**dict(zip(keys, told, strict=True)), "seeds": len(own)}
        for when in ("before", "after"):
            for name in ("accuracy", "loss"):
                line[f"{when}_{name}"] = statistics.mean(r[when][name] for r in own)
        out.append(line)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=list(BASELINE), choices=list(BASELINE))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seconds", nargs="*", type=float, default=[6.0, 45.0])
    parser.add_argument("--folder", type=Path, default=Path("runs/shrink_vs_peers"))
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    log = options.folder / "repair.jsonl"
    for seed in range(options.seeds):
        for name in options.models:
            task = peers.without_test(peers.task_of(name, peers.DATA[name]))
            original, _ = peers.original_of(name, task, BASELINE[name], options.folder)
            job = Job(name, original, task, seed, options.folder, 0.0)
            for amount in AMOUNTS:
                rows_of(job, amount, options.seconds, log)
    rows = peers.written(log)
    found = {"machine": machine(), "summary": summary(rows), "rows": rows}
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    for line in found["summary"]:
        print(json.dumps(line))


if __name__ == "__main__":
    main()
