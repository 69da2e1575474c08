"""All-in-One: nested pruning ratios in one set of weights, switched with the processor's frequency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from espalier import tasks
from espalier.compress import Pretrained
from espalier.compress.gating import unit_gates
from espalier.costs import OnnxRuntime
from espalier.export import to_onnx
from espalier.recipes import Recipe
from espalier.recipes._parts.gated import BEDS, Bed, cuttable, evenly, macs, shown
from espalier.solvers.prune import budgeted
from espalier.solvers.prune.nested import nested
from espalier.tasks import Task
from espalier.train import Recipe as Training
from espalier.train import evaluate, fit
from espalier.train.seeds import mixed

FREQUENCIES = (1.0, 0.85, 0.7, 0.6)  # of the highest; a level takes as much of the time
GRID = (1.0, 0.7, 0.5, 0.35, 0.2, 0.1)  # shares of MACs whose latency is looked at
MOST_LOST = 0.01  # accuracy of a level against the same ratio alone
MOST_BYTES = 1.1  # of one model
MOST_SPREAD = 0.5  # of the whole model's
_ROUNDS = 9  # of timing
_ONE, _ALONE = 95, 96  # purposes of random streams


@dataclass(frozen=True)
class Setting:
    """How long all levels learn, and each alone; whether latency is measured, or counted in MACs."""

    bed: Bed
    training: Training
    measured: bool = True
    multiple: int = 8  # channels that the runtime's kernels take at once


SCALES = {
    "smoke": Setting(BEDS["smoke"], Training(epochs=1, batch=32, lr=0.02), False, 1),
    "cpu": Setting(replace(BEDS["cpu"], widths=(32, 48, 64)), Training(epochs=14, lr=0.05)),
    "gpu": Setting(BEDS["gpu"], Training(epochs=40, batch=128, lr=0.05)),
}


def run(scale: str, seed: int, out: Path | None) -> dict[str, Any]:
    """All ratios in one, each alone with as many epochs, and latency over frequencies."""
    setting = SCALES[scale]
    task = tasks.make(setting.bed.task)
    family = cuttable(setting.bed.original(task, seed), task, setting.multiple)
    whole = macs(family.model, task)
    ratios = shares(family, setting, task)
    within: list[dict[str, float]] = [{"macs": share * whole} for share in ratios[1:]]
    together = nested(family, task, within, setting.training, seed=mixed(seed, _ONE))
    networks = [together.network(level) for level in range(together.levels)]
    found = [level(network, task) for network in networks]
    every: list[dict[str, float]] = [{"macs": whole}, *within]
    for row, candidate, limits in zip(found, together.candidates, every, strict=True):
        row["widths"] = shown(candidate)
        if limits["macs"] < whole:
            alone = nested(family, task, [limits], setting.training, seed=mixed(seed, _ALONE))
            row["alone"] = evaluate(alone.network(1), task, "test")["accuracy"]
        else:
            network = family.build(family.original)
            fit(network, task, setting.training, mixed(seed, _ALONE))
            row["alone"] = evaluate(network, task, "test")["accuracy"]
    times = latencies(networks, setting, task)
    return {
        "ratios": ratios,
        "levels": found,
        "bytes": together.bytes(),
        "latency": times,
        "check": checked(found, together.bytes(), times["ms"]),
    }


def shares(family: Pretrained, setting: Setting, task: Task) -> list[float]:
    """The share of multiply-accumulates that takes each frequency's share of time.

    Looked up between networks of one ratio everywhere, which are measured.
    """
    if not setting.measured:
        return list(FREQUENCIES)
    gated = unit_gates(family)
    networks = [family.build(evenly(budgeted(gated, {"macs": f"{share:.0%}"}))) for share in GRID]
    ms = np.array(latencies(networks, setting, task)["ms"])
    order = np.argsort(ms)
    found = np.interp(np.array(FREQUENCIES) * ms[0], ms[order], np.array(GRID)[order])
    tighter = np.minimum.accumulate(np.minimum(found, FREQUENCIES) * (1 - 1e-6 * np.arange(4)))
    return [1.0, *tighter[1:].tolist()]


def level(network: nn.Module, task: Task) -> dict[str, Any]:
    """A level as it is deployed."""
    return {"accuracy": evaluate(network, task, "test")["accuracy"], "macs": macs(network, task)}


def latencies(networks: Sequence[nn.Module], setting: Setting, task: Task) -> dict[str, Any]:
    """A time for each network at full frequency: medians over rounds, in turns."""
    if not setting.measured:
        return {
            "ms": [macs(n, task) / 1e6 for n in networks],
            "how": "counted, in millions of MACs",
        }
    runtime = OnnxRuntime()
    x = runtime.batched(torch.zeros(1, *task.shape))
    models = [to_onnx(network, x, fast=True) for network in networks]
    times = [[runtime.quick(model, x).median_ms for model in models] for _ in range(_ROUNDS)]
    return {"ms": np.median(times, axis=0).tolist(), "how": f"measured in {runtime.name}"}


def spread(ms: Sequence[float], switching: bool) -> float:
    """The standard deviation of latency over the frequencies, as a share of its mean.

    A frequency stretches time by its inverse. With `switching` each frequency runs its own level.
    """
    times = [(one if switching else ms[0]) / f for one, f in zip(ms, FREQUENCIES, strict=True)]
    return float(np.std(times) / np.mean(times))


def checked(
    found: Sequence[Mapping[str, Any]], size: Mapping[str, int], ms: Sequence[float]
) -> dict[str, Any]:
    """The three claims: every level near the same alone, little memory, steady latency."""
    lost = [row["alone"] - row["accuracy"] for row in found]
    memory = size["all"] / size["one"]
    fixed, switched = spread(ms, False), spread(ms, True)
    accurate, small = max(lost) <= MOST_LOST, memory <= MOST_BYTES
    steady = switched <= MOST_SPREAD * fixed
    return {
        "accuracy_lost": lost,
        "bytes_of_one": memory,
        "spread": {"fixed": fixed, "switching": switched},
        "accuracy_holds": accurate,
        "memory_holds": small,
        "steady": steady,
        "holds": bool(accurate and small and steady),
    }


RECIPE = Recipe(
    name="all-in-one",
    title="All-in-One: one model for every frequency of the processor",
    source="Gong, Zhan, Zhao, Wu, Wu, Ding, Jiang, Qin & Wang, All-in-One: A Highly Representative DNN "
    "Pruning Framework for Edge Devices with Dynamic Power Management (ICCAD 2022), "
    "https://arxiv.org/abs/2212.05122",
    parts=(
        "family: a trained residual CNN; coupled channels are cut together, eight at once as the runtime's "
        "kernels take them",
        "gates: one score a channel; four thresholds on it make four nested networks",
        "training: every step runs all levels on one batch; smaller ones also learn from the whole one; "
        "each has its own norms",
        "budget: the multiply-accumulates that take 100%, 85%, 70% and 60% of the time, one for each "
        "frequency, looked up between measured networks of one ratio everywhere",
        "cost: latency measured in ONNX Runtime at full frequency; other frequencies are emulated by "
        "stretching time",
        "baselines: each ratio trained alone by the same method for as many epochs; the whole model at "
        "every frequency",
    ),
    works_when="Each of the four levels loses at most 1 point of test accuracy against the same ratio trained "
    "alone; all of them together take at most 1.1 times the bytes of one model; and over the four frequencies "
    "the spread of latency is at most half of that of the whole model.",
    run=run,
    text="""
A phone whose battery runs low lowers its frequency, and a network that was fast enough is no longer.
Here a smaller network is inside the large one: channels have one score, and a level keeps those above its
threshold, so that a smaller level is always part of a larger one and switching loads nothing but norms.

Scores learn by the gradients that all levels have for their masks, straight through the thresholds, and
each threshold is wherever its level's budget is just kept.

Spread is the standard deviation of latency over frequencies as a share of the mean. What differs from the
paper: channels instead of blocks of weights, frequencies are emulated; digits of 8x8 pixels (the gpu scale is
CIFAR-10).

Five seeds at the scale cpu: the check holds in two. All levels together take 1.04 times the bytes of one model. The spread of
latency is 0.081 on average (0.045 to 0.101) against 0.192, at most half of it in four; every level is within a point of the same
ratio trained alone in three.
""",
)
