"""Accuracy at 75%, 50% and 25% of a trained model's latency: `espalier.shrink` beside its peers.

The models are ResNet-20 and ResNet-56 for CIFAR-10 with published weights, and a small MobileNet. The
weights were learned on lossless images, so each original is first fine-tuned on the JPEG training
images at hand (the MobileNet is trained on them, at 16x16); that network is everybody's original.

Each method gives, for every share, a network whose latency in ONNX Runtime (one thread, batch 1, timed
beside the original) keeps it. Each is then fine-tuned in the same way for the same processor time, so
that what else runs on the machine decides nothing: SGD and a cosine, half of the loss from the
original's outputs, the best epoch by validation. What `shrink` spends on its closed-form repair is
taken off its time.

- espalier: `espalier.shrink` over widths and depth, least squares, fine-tuning.
- espalier bits, espalier mix: the same over 8 bits or float for every layer, and over all three
  together; fine-tuned with their rounding, timed and tested as integers.
- torch-pruning global, local: group Taylor importance in steps, until the measured latency is kept.
- modelopt fastnas: its search under a limit on FLOPs, lowered until the measured latency is kept.
- uniform width: every width the same share, the largest weights stay.

Peers and uniform widths come twice: in multiples of 4 channels, and "by 8".

The test images are read once, when all networks are there. Every network is written down as soon as it
is made: a run that is stopped goes on, and runs of different seeds (`--first`) may share a folder; the
last of them sums up all. With `--keep` what the results file has of other models, seeds and methods stays,
made on another machine, say, from another original. Leads are taken seed by seed, so all methods of a seed
should come from one run.

    python benchmarks/shrink_vs_peers.py --models resnet20 --seeds 1 --seconds 60     # about an hour
    python benchmarks/shrink_vs_peers.py --quick                                      # minutes
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import espalier as esp
import models
from espalier.compress.repair import finetune
from espalier.costs import count
from espalier.errors import EspalierError
from espalier.export import to_onnx
from espalier.flows.machine import machine
from espalier.tasks import Task
from espalier.train import Recipe
from espalier.train.seeds import global_seed
from shrinkers import METHODS, OWN, Cut, Job, method

RESULT = Path(__file__).parent / "results" / "shrink_vs_peers.json"
DATA = {"resnet20": "cifar10", "resnet56": "cifar10", "mobilenet": "cifar10:size=16"}
VALIDATION = 2000
SHARES = (0.75, 0.5, 0.25)
TUNING = Recipe(epochs=10_000, lr=0.02)  # ended by time alone
FROM_SCRATCH = Recipe(epochs=10_000, lr=0.2)
AHEAD = 0.02  # accuracy: the goal at the least share
Row = dict[str, Any]


# --- the models and their data --------------------------------------------------------------------


def task_of(name: str, data: str) -> Task:
    """The images, normalised as the model wants them."""
    head, _, tail = data.partition(":")
    if "validation=" not in tail:
        tail = ",".join(filter(None, (tail, f"validation={VALIDATION}")))
    task = esp.tasks.make(f"{head}:{tail}")
    if name in models.WEIGHTS:
        task.mean = torch.tensor(models.IMAGENET_MEAN)
        task.std = torch.tensor(models.IMAGENET_STD)
    return task


def without_test(task: Task) -> Task:
    """The task as every method sees it: its test images are those of validation."""
    twin: Any = copy.copy(task)
    twin._splits = {**twin._splits, "test": twin._splits["validation"]}
    twin._fingerprint = ""
    return twin  # type: ignore[no-any-return]


def original_of(name: str, task: Task, seconds: float, folder: Path) -> tuple[nn.Module, Row]:
    """The original, fine-tuned on these images once; everybody starts from it."""
    weights, about = folder / f"{name}.safetensors", folder / f"{name}.json"
    with global_seed(0):
        network = models.MODELS[name]()
    if about.exists():
        network.load_state_dict(load_file(weights))
        return network.eval(), json.loads(about.read_text())
    published = name in models.WEIGHTS
    if published:
        root = os.environ.get("ESPALIER_DATA")
        if not root:
            raise EspalierError(f"the weights of {name} are in the data: set ESPALIER_DATA")
        models.load(network, Path(root) / "weights" / models.WEIGHTS[name])
    recipe = TUNING if published else FROM_SCRATCH
    found = finetune(
        network, None, task, recipe, seconds=seconds, patience=10_000, clock=time.process_time
    )
    row = {k: found[k] for k in ("before", "after", "best_epoch", "seconds", "stopped")}
    row["epochs"] = len(found["history"])
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, weights)
    about.write_text(json.dumps(row))
    return network.eval(), row


# --- one method on one model --------------------------------------------------------------------------


def tuned(job: Job, cut: Cut, seconds: float) -> tuple[nn.Module, Row]:
    """A cut network, fine-tuned for what is left of the time."""
    network = cut.network
    left = max(1.0, seconds - cut.mended)
    with global_seed(job.seed):
        found = finetune(
            network,
            job.original,
            job.task,
            TUNING,
            seconds=left,
            patience=10_000,
            seed=job.seed,
            clock=time.process_time,
        )
    counted = count(network, job.example)
    return network, {
        "validation_before": found["before"]["accuracy"],
        "validation": found["after"]["accuracy"],
        "epochs": len(found["history"]),
        "steps": sum(row["steps"] for row in found["history"]),
        "tuning_seconds": found["seconds"],
        "mending_seconds": cut.mended,
        "params": counted.params,
        "macs": counted.macs,
    }


def compared(job: Job, name: str, shares: Sequence[float], seconds: float) -> list[Row]:
    """The rows of one method, one a share; networks are kept as ONNX for the test."""
    begun = time.perf_counter()
    rows = []
    for share, cut in method(name, job).cuts(shares).items():
        row: Row = {"model": job.name, "method": name, "seed": job.seed, "share": share}
        if cut is None:
            rows.append({**row, "failed": "no network of this method keeps the latency"})
            continue
        row |= {"ratio_before": cut.ratio, "cut_seconds": cut.seconds, "amount": cut.amount}
        network, found = tuned(job, cut, seconds)
        file = f"{job.name}-{name.replace(' ', '_')}-{job.seed}-{share:g}.onnx"
        (job.folder / file).write_bytes(to_onnx(network, job.example, fast=True))
        row |= {**found, "ratio": job.ratio(network), "load": job.clock.load, "file": file}
        rows.append(row)
    print(f"{job.name} {name} seed {job.seed}: {time.perf_counter() - begun:.0f} s", flush=True)
    return rows


# --- the test, once -----------------------------------------------------------------------------------


def accuracy(path: Path, task: Task) -> float:
    """Test accuracy of an ONNX file."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(str(path), options)
    right = total = 0
    for x, y in task.batches("test", 500):
        logits = session.run(None, {"input": x.contiguous().numpy()})[0]
        right += int((np.asarray(logits).argmax(1) == y.numpy()).sum())
        total += len(y)
    return right / total


def tested(rows: Sequence[Row], folder: Path, tasks: Mapping[str, Task]) -> list[Row]:
    """The rows with their test accuracies; what was tested before is not tested again."""
    known_file = folder / "tests.json"
    known = json.loads(known_file.read_text()) if known_file.exists() else {}
    for row in rows:
        file = row.get("file")
        if file and file not in known:
            known[file] = accuracy(folder / file, tasks[row["model"]])
            known_file.write_text(json.dumps(known))
    return [{**row, "test": known[row["file"]]} if "file" in row else row for row in rows]


def lead(ours: Mapping[int, float], others: Sequence[Mapping[int, float]]) -> float | None:
    """How far one method is ahead of the nearest of others, each on the seeds that both ran."""
    apart = [
        statistics.mean(ours[seed] - other[seed] for seed in ours.keys() & other.keys())
        for other in others
        if ours.keys() & other.keys()
    ]
    return min(apart) if apart else None


def summary(rows: Sequence[Row]) -> list[Row]:
    """For each model and share: every method over seeds, and how far ours is ahead of the best."""
    out = []
    for model, share in dict.fromkeys((r["model"], r["share"]) for r in rows):
        group = [r for r in rows if (r["model"], r["share"]) == (model, share)]
        line: Row = {"model": model, "share": share}
        by_seed: dict[str, dict[int, float]] = {}
        for name in dict.fromkeys(r["method"] for r in group):
            own = [r for r in group if r["method"] == name and "test" in r]
            if own:
                tests = [r["test"] for r in own]
                by_seed[name] = {r["seed"]: r["test"] for r in own}
                line[name] = {
                    "test": statistics.mean(tests),
                    "min": min(tests),
                    "max": max(tests),
                    "ratio": statistics.mean(r["ratio"] for r in own),
                    "seeds": len(own),
                }
        peers = [tests for name, tests in by_seed.items() if name not in OWN]
        ahead = lead(by_seed.get("espalier", {}), peers)
        if ahead is not None:
            goal = AHEAD if share == min(SHARES) else 0.0
            line |= {"ahead_of_best": ahead, "goal": goal, "met": ahead > 0 and ahead >= goal}
        alone = [by_seed[k] for k in ("espalier", "espalier bits") if k in by_seed]
        mix = lead(by_seed.get("espalier mix", {}), alone)
        if mix is not None:
            line["mix_ahead_of_either"] = mix
        mixed = lead(by_seed.get("espalier mix", {}), peers)
        if mixed is not None:  # which peers are all in float
            line["mix_ahead_of_best"] = mixed
        out.append(line)
    return out


def with_before(found: Row, before: Row) -> Row:
    """What was found, and of what was found before the originals, rows and models that it lacks."""
    new = {_which(row) for row in found["rows"]}
    rows = [row for row in before.get("rows", ()) if _which(row) not in new] + found["rows"]
    originals = {(o["model"], o["test"]): o for o in before.get("originals", ())}
    originals |= {(o["model"], o["test"]): o for o in found["originals"]}
    settings = before.get("settings", {}) | found["settings"]
    return {
        **found,
        "settings": settings,
        "originals": list(originals.values()),
        "summary": summary(rows),
        "rows": rows,
    }


def _which(row: Row) -> tuple[Any, ...]:
    return row["model"], row["method"], row["seed"], row["share"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=list(DATA), choices=list(DATA))
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument(
        "--data", help="a task for all models, such as cifar10:train=4000,test=1000"
    )
    parser.add_argument("--shares", nargs="*", type=float, default=list(SHARES))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="of the seeds")
    parser.add_argument(
        "--seconds", type=float, default=300, help="processor time of every fine-tuning"
    )
    parser.add_argument(
        "--baseline-seconds", type=float, default=900, help="processor time of the original's"
    )
    parser.add_argument("--plan-seconds", type=float, default=240, help="of shrink, before repair")
    parser.add_argument("--threads", type=int, default=1, help="of training; latency has one")
    parser.add_argument("--keep", action="store_true", help="what --out has besides")
    parser.add_argument("--quick", action="store_true", help="ResNet-20, little data, one seed")
    parser.add_argument("--folder", type=Path, default=Path("runs/shrink_vs_peers"))
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    if options.quick:
        options.models, options.seeds = ["resnet20"], 1
        options.data = options.data or "cifar10:train=2000,validation=500,test=1000"
        options.seconds = options.baseline_seconds = 20.0
        options.plan_seconds = 60.0
        options.folder, options.out = options.folder / "quick", options.folder / "quick.json"
    torch.set_num_threads(options.threads)
    options.folder.mkdir(parents=True, exist_ok=True)
    tasks = {name: task_of(name, options.data or DATA[name]) for name in options.models}
    rows, originals = run(options, tasks)
    rows = [r for r in rows if r["model"] in tasks]  # a folder may hold those of other models
    tests = tested([*rows, *originals], options.folder, tasks)
    rows, originals = tests[: len(rows)], tests[len(rows) :]
    names = ("data", "seconds", "baseline_seconds", "plan_seconds", "threads")
    settings = {name: getattr(options, name) for name in names} | {"machine": machine()}
    found = {
        "settings": dict.fromkeys(tasks, settings),
        "originals": originals,
        "summary": summary(rows),
        "rows": rows,
    }
    if options.keep and options.out.exists():
        found = with_before(found, json.loads(options.out.read_text()))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    for line in found["summary"]:
        print(json.dumps(line))


def run(options: argparse.Namespace, tasks: Mapping[str, Task]) -> tuple[list[Row], list[Row]]:
    """Everything but the test; rows are written down as they come, and never made again."""
    log = options.folder / "rows.jsonl"
    rows = written(log)
    originals = []
    for name, task in tasks.items():
        blind = without_test(task)
        network, about = original_of(name, blind, options.baseline_seconds, options.folder)
        file, example = f"{name}-original.onnx", torch.zeros(1, *task.shape)
        (options.folder / file).write_bytes(to_onnx(network, example, fast=True))
        counted = count(network, example)
        size = {"params": counted.params, "macs": counted.macs}
        originals.append({"model": name, **about, **size, "file": file})
    for seed in range(options.first, options.first + options.seeds):
        for name, task in tasks.items():
            network, _ = original_of(name, task, options.baseline_seconds, options.folder)
            for how in options.methods:
                done = {r["share"] for r in rows if (r["model"], r["method"], r["seed"]) == (name, how, seed)}  # fmt: skip
                left = [share for share in options.shares if share not in done]
                if not left:
                    continue
                job = Job(name, network, without_test(task), seed, options.folder, options.plan_seconds)  # fmt: skip
                for row in compared(job, how, left, options.seconds):
                    rows.append(row)
                    with log.open("a") as file_:
                        file_.write(json.dumps(row) + "\n")
    return written(log), originals


def written(log: Path) -> list[Row]:
    """The rows so far, those of other runs in the folder among them."""
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


if __name__ == "__main__":
    main()
