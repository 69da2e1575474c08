"""The found network against what people would do instead, at the same measured latency.

For each data set, latency budget and seed, all trained with the same recipe and epochs:

- found: `espalier.search`, the network it hands out (the better of two starts, by validation);
- found, from scratch: the same network trained from scratch only;
- uniform: the same family at depth 2 and kernel 3, its width scaled to the same latency;
- hand-scaled: what the report calls scaled by hand: all decisions grow together, same two starts;
- random: random candidates of the family within the budget, each trained to the end from scratch,
  for as long as the search took (its share of the supernet and the table included: one supernet
  serves the three budgets of a seed); the best by validation;
- random on the supernet: random search given the same trials and finalists as the search;
- mobilenetv2, resnet: hand-made networks of those styles, their width scaled to the same latency.

Uniform, mobilenetv2 and resnet are trained twice (two seeds), as the found one has two starts.

The family is the ResNet-like one: at this size ONNX Runtime runs dense convolutions faster than
depthwise ones. Choice is by validation, report on test. Latency is measured in ONNX Runtime on one thread.

    python benchmarks/search_vs_baselines.py --quick       # one seed, one budget: minutes
    python benchmarks/search_vs_baselines.py               # 5 seeds, 3 budgets, 2 data sets
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import espalier as esp
from espalier import train
from espalier.flows.machine import machine
from espalier.flows.plan import Plan
from espalier.problem import Reading
from espalier.study import Processes
from espalier.study.executor import Job, Outcome

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Setting:
    task: str
    family: str
    latencies_ms: tuple[float, ...]
    plan: Plan


SETTINGS = {
    "cifar10-16": Setting(
        "cifar10:size=16,train=2000,validation=1000,test=4000",
        "resnet",
        (0.025, 0.035, 0.05),
        Plan(supernet_epochs=30, trials=160, population=32, finalists=2, final_epochs=12),
    ),
    "mnist-16": Setting(
        "mnist:size=16,train=500,validation=1000,test=4000",
        "resnet",
        (0.025, 0.035, 0.05),
        Plan(supernet_epochs=12, trials=96, population=32, finalists=2, final_epochs=6),
    ),
}


# --- networks made by hand -------------------------------------------------------------------


def _conv(i: int, o: int, k: int, s: int = 1, groups: int = 1, relu: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(i, o, k, s, k // 2, groups=groups, bias=False),
        nn.BatchNorm2d(o),
    ]
    return nn.Sequential(*layers, nn.ReLU()) if relu else nn.Sequential(*layers)


class Residual(nn.Module):
    def __init__(self, body: nn.Module, shortcut: nn.Module | None, relu: bool) -> None:
        super().__init__()
        self.body, self.shortcut, self.relu = body, shortcut or nn.Identity(), relu

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x) + self.shortcut(x)
        return torch.relu(y) if self.relu else y


def _inverted(i: int, o: int, s: int, t: int = 6) -> nn.Module:
    h = i * t
    body = nn.Sequential(_conv(i, h, 1), _conv(h, h, 3, s, groups=h), _conv(h, o, 1, relu=False))
    return Residual(body, None, relu=False) if s == 1 and i == o else body


def _basic(i: int, o: int, s: int) -> nn.Module:
    body = nn.Sequential(_conv(i, o, 3, s), _conv(o, o, 3, relu=False))
    shortcut = _conv(i, o, 1, s, relu=False) if s != 1 or i != o else None
    return Residual(body, shortcut, relu=True)


def mobilenetv2(shape: tuple[int, ...], classes: int, scale: float) -> nn.Module:
    """MobileNetV2-style (Sandler et al., 2018), three stages of two, expansion 6, kernels 3."""
    w = [max(4, round(c * scale / 4) * 4) for c in (16, 16, 24, 40)]
    blocks: list[nn.Module] = [_conv(shape[0], w[0], 3)]
    width = w[0]
    for out, stride in zip(w[1:], (1, 2, 2), strict=True):
        blocks += [_inverted(width, out, stride), _inverted(out, out, 1)]
        width = out
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def resnet(shape: tuple[int, ...], classes: int, scale: float) -> nn.Module:
    """ResNet-style for small images (He et al., 2016), three stages of one basic block."""
    w = [max(4, round(c * scale / 4) * 4) for c in (16, 32, 64)]
    blocks: list[nn.Module] = [_conv(shape[0], w[0], 3)]
    width = w[0]
    for out, stride in zip(w, (1, 2, 2), strict=True):
        blocks.append(_basic(width, out, stride))
        width = out
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def uniform(shape: tuple[int, ...], classes: int, scale: float) -> nn.Module:
    """One network of the searched family: all widths by one factor, all else in the middle."""
    w = [max(4, round(c * scale / 4) * 4) for c in (16, 32, 48)]
    family = esp.nets.ResNet(shape, classes, shape[1], widths=[(x,) for x in w], depth=2, kernel=3)
    return family.build(family.space.decode(family.space.corner(last=True))[0])


STYLES = {"uniform": uniform, "mobilenetv2": mobilenetv2, "resnet": resnet}


def largest_within(
    make: Callable[[float], nn.Module], latency_ms: float, runtime: Any, example: Tensor
) -> float | None:
    """The largest width multiplier whose network keeps the latency as measured (by bisection)."""
    grid = [float(s) for s in np.arange(0.25, 4.01, 0.125)]

    def keeps(scale: float) -> bool:
        return bool(runtime.measure(make(scale).eval(), example).median_ms <= latency_ms)

    low, high = -1, len(grid)  # grid[low] keeps it, grid[high] does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if keeps(grid[middle]) else (low, middle)
    return grid[low] if low >= 0 else None


def remembered(file: Path, key: str, compute: Callable[[], Any]) -> Any:
    """What was measured once is the same for every seed."""
    known = json.loads(file.read_text()) if file.exists() else {}
    if key not in known:
        known[key] = compute()
        file.write_text(json.dumps(known))
    return known[key]


# --- one way to train them all ---------------------------------------------------------------


@dataclass
class TrainHand:
    """Trains hand-made networks in a worker: the candidate says which style, scale and seed."""

    task: Any
    recipe: Any

    def __call__(self, candidate: esp.Candidate) -> dict[str, Reading]:
        style = STYLES[str(candidate["style"])]
        seed = int(candidate["seed"])
        torch.manual_seed(seed)
        network = style(self.task.shape, self.task.classes, float(candidate["scale"]))
        return both_splits(network, self.task, self.recipe, seed)


@dataclass
class TrainFamily:
    """Trains a candidate of the family from scratch in a worker."""

    family: Any
    task: Any
    recipe: Any
    seed: int

    def __call__(self, candidate: esp.Candidate) -> dict[str, Reading]:
        torch.manual_seed(self.seed)
        network = self.family.build(candidate)
        return both_splits(network, self.task, self.recipe, self.seed)


def both_splits(network: nn.Module, task: Any, recipe: Any, seed: int) -> dict[str, Reading]:
    train.fit(network, task, recipe, seed)
    out = {}
    for split in ("validation", "test"):
        out[split] = Reading(
            train.evaluate(network, task, split)["accuracy"], "", "measured", split
        )
    return out


def evaluated(work: Any, jobs: Iterable[Job], workers: int) -> Iterator[Outcome]:
    """Outcomes of jobs in worker processes, one thread each; the first failure ends it."""
    with Processes(workers).open(work) as pool:
        for outcome in pool.run(jobs):
            if outcome.error:
                raise RuntimeError(outcome.error)
            yield outcome


def chosen(rows: list[dict[str, Reading]]) -> float:
    """Test accuracy of the row that is best by validation."""
    return max(rows, key=lambda r: r["validation"].value)["test"].value


# --- the comparison --------------------------------------------------------------------------


def compare(
    name: str, setting: Setting, latency: float, seed: int, workers: int, folder: Path
) -> dict[str, Any]:
    task = esp.tasks.make(setting.task)
    runtime = esp.costs.OnnxRuntime(threads=1, batch=1)
    shared = folder / f"{name}-{seed}"
    out = folder / f"{name}-{seed}-{latency}"
    if out.exists():
        shutil.rmtree(out)  # a comparison that was stopped is done again whole
    found = esp.search(
        setting.family,
        task,
        within={"latency_ms": latency},
        on=runtime,
        budget=f"{setting.plan.trials} trials",
        plan=setting.plan,
        seed=seed,
        workers=workers,
        out=out,
        reuse=shared if shared.exists() else None,
    )
    if not shared.exists():
        shutil.copytree(out, shared)
    seconds = search_seconds(out, shared, len(setting.latencies_ms))
    result = found.to_json()
    recipe = replace(esp.Recipe(), epochs=setting.plan.final_epochs)
    family = found.family
    row: dict[str, Any] = {
        "data": name,
        "latency_ms": latency,
        "seed": seed,
        "search_seconds": round(seconds, 1),
        "found": result["best"]["metrics"]["accuracy"]["value"],
        "found_latency_ms": result["best"]["metrics"]["latency_ms"]["value"],
        "found_start": result["best"]["start"],
        "candidate": result["best"]["candidate"],
    }
    names = {"scaled by hand": "hand-scaled", "random search": "random on the supernet"}
    for entry in result["baselines"]:
        row[names[entry["name"]]] = entry["metrics"]["accuracy"]["value"]
        row[names[entry["name"]] + " latency_ms"] = entry["metrics"]["latency_ms"]["value"]
    scratch = found.folder / "weights" / f"{found.best.candidate.id}-scratch.safetensors"
    network = family.build(found.best.candidate)
    network.load_state_dict(load_file(scratch))
    row["found, from scratch"] = train.evaluate(network, task, "test")["accuracy"]
    row["random"], row["random trained"] = random_search(
        family, task, recipe, found, latency, seconds, seed, workers
    )
    styled = []
    for style in STYLES.values():
        make = functools.partial(style, task.shape, task.classes)
        scale = remembered(
            folder / "scales.json",
            f"{name} {latency} {style.__name__}",
            functools.partial(largest_within, make, latency, runtime, family.example()),
        )
        if scale is not None:
            styled += [
                esp.Candidate({"style": style.__name__, "scale": scale, "seed": s})
                for s in (seed, seed + 1000)
            ]
    rows: dict[str, list[dict[str, Reading]]] = {}
    jobs = [Job(i, candidate) for i, candidate in enumerate(styled)]
    for outcome in evaluated(TrainHand(task, recipe), jobs, workers):
        rows.setdefault(str(styled[outcome.id]["style"]), []).append(outcome.readings)
    row.update({style: chosen(got) for style, got in rows.items()})
    return row


def search_seconds(out: Path, shared: Path, budgets: int) -> float:
    """Wall seconds of one search, with its share of the supernet and the latency table; without
    the baselines that the search trained for its own report (half of its final trainings)."""
    with esp.Study.open(out) as study, esp.Study.open(shared) as first:
        own, paid = study.phase_seconds(), first.phase_seconds()
    return own["search"] + own["final"] / 2 + (paid["calibrate"] + paid["supernet"]) / budgets


def random_search(
    family: Any,
    task: Any,
    recipe: Any,
    found: Any,
    latency: float,
    seconds: float,
    seed: int,
    workers: int,
) -> tuple[float | None, int]:
    """Random candidates within the budget, trained to the end until the time is up."""
    rng = np.random.default_rng([seed, 77])
    space, deadline = family.space, time.time() + seconds
    predicted = found.pricing

    def feasible() -> Iterator[esp.Candidate]:
        while time.time() < deadline:
            codes = space.sample(256, rng)
            cost = predicted(codes)["latency_ms"]
            for i in np.flatnonzero(cost <= latency):
                if time.time() > deadline:
                    return
                yield space.decode(codes[i : i + 1])[0]

    jobs = (Job(i, candidate) for i, candidate in enumerate(feasible()))
    work = TrainFamily(family, task, recipe, seed)
    rows = [outcome.readings for outcome in evaluated(work, jobs, workers)]
    return (chosen(rows) if rows else None), len(rows)  # a tight limit may refuse all it draws


METHODS = (
    "found",
    "found, from scratch",
    "uniform",
    "hand-scaled",
    "random",
    "mobilenetv2",
    "resnet",
    "random on the supernet",
)


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Median and spread over seeds for each data set, budget and method; wins of found."""
    out = []
    for key in dict.fromkeys((r["data"], r["latency_ms"]) for r in rows):
        group = [r for r in rows if (r["data"], r["latency_ms"]) == key]
        line: dict[str, Any] = {"data": key[0], "latency_ms": key[1], "seeds": len(group)}
        for method in METHODS:
            values = [r[method] for r in group if r.get(method) is not None]
            if values:
                line[method] = {
                    "median": statistics.median(values),
                    "min": min(values),
                    "max": max(values),
                    "n": len(values),  # fewer than seeds: nothing was found or fits
                    "found_ahead": sum(
                        r["found"] > r[method] for r in group if r.get(method) is not None
                    ),
                }
        out.append(line)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed and one budget")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--data", nargs="*", default=list(SETTINGS))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("runs/search_vs_baselines"))
    parser.add_argument("--out", type=Path, default=RESULTS / "search_vs_baselines.json")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    log = options.folder / "rows.jsonl"  # a run that is stopped goes on here
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {(r["data"], r["latency_ms"], r["seed"]) for r in rows}
    for seed in range(1 if options.quick else options.seeds):
        for name in options.data:
            setting = SETTINGS[name]
            budgets = setting.latencies_ms[1:2] if options.quick else setting.latencies_ms
            for latency in budgets:
                if (name, latency, seed) in done:
                    continue
                row = compare(name, setting, latency, seed, options.workers, options.folder)
                rows.append(row)
                with log.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps({k: v for k, v in row.items() if k != "candidate"}), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(
        json.dumps({"machine": machine(), "summary": summary(rows), "rows": rows}, indent=1)
    )
    for line in summary(rows):
        print(json.dumps(line))


if __name__ == "__main__":
    main()
