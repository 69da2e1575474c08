"""What recipes on measured latency share: clocks, networks at a latency, training one network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from espalier.costs import OnnxRuntime, count, layers, machine
from espalier.costs.side_by_side import interleaved
from espalier.export import to_onnx
from espalier.tasks import Task
from espalier.train import Recipe as Training
from espalier.train import evaluate, fit
from espalier.train.seeds import global_seed, mixed

_WEIGHTS = 31  # purpose of the random stream
Make = Callable[[], nn.Module]


class Clock(ABC):
    """What times networks side by side."""

    how: str

    @abstractmethod
    def rounds(self, networks: Sequence[nn.Module], example: Tensor) -> list[list[float]]:
        """Milliseconds of each network, a number a round; all are timed in every round."""

    def ms(self, networks: Sequence[nn.Module], example: Tensor) -> list[float]:
        """The median over rounds, a number a network."""
        return [median(times) for times in self.rounds(networks, example)]

    def ratio(self, network: nn.Module, reference: nn.Module, example: Tensor) -> float:
        """A network's latency over that of a reference: the median of the ratios within rounds."""
        own, other = self.rounds([network, reference], example)
        return median(a / b for a, b in zip(own, other, strict=True))

    def about(self) -> dict[str, Any]:
        """How the numbers were obtained."""
        return {"how": self.how}


class Counted(Clock):
    """A made-up processor without noise: a launch for each layer, depthwise work six times as dear.

    For trials of the machinery, and where numbers must not hang on the machine.
    """

    how = "by formula: a made-up processor"

    def __init__(self, launch: float = 0.002, depthwise: float = 6.0) -> None:
        self.launch, self.depthwise = launch, depthwise

    def rounds(self, networks: Sequence[nn.Module], example: Tensor) -> list[list[float]]:
        """One round."""
        return [[self._of(network, example)] for network in networks]

    def _of(self, network: nn.Module, example: Tensor) -> float:
        network.eval()
        rows = [r for r in layers(network, example) if r["kind"] not in ("norm", "activation")]
        dear = sum(float(r["macs"]) for r in rows if r["kind"] == "depthwise")
        macs = sum(float(r["macs"]) for r in rows) + (self.depthwise - 1) * dear
        return self.launch * len(rows) + macs / 1e6


class Processor(Clock):
    """This machine's processor in ONNX Runtime, networks interleaved in an order drawn anew."""

    def __init__(self, runtime: OnnxRuntime | None = None, rounds: int = 7, seed: int = 0) -> None:
        # many short looks: what disturbs one of them does not disturb the median
        self.runtime = runtime or OnnxRuntime(seconds=0.1)
        self.times, self.seed = rounds, seed
        self.how = f"measured in {self.runtime.name}, median of {rounds} rounds, interleaved"
        self.load = 0.0  # the most that other work disturbed a measurement

    def rounds(self, networks: Sequence[nn.Module], example: Tensor) -> list[list[float]]:
        """Every network once a round."""
        x = self.runtime.batched(example)
        models = [to_onnx(network.eval(), x, fast=True) for network in networks]
        start = machine.snapshot()
        found = interleaved(self.runtime, models, x, self.times, self.seed)
        self.load = max(self.load, machine.load_between(start, machine.snapshot()))
        return [list(times) for times in found.T.tolist()]

    def about(self) -> dict[str, Any]:
        """The runtime, and how many cores other work kept busy at most."""
        return {"how": self.how, "load": self.load}


def widest(
    make: Callable[[float], nn.Module],
    scales: Sequence[float],
    most: float,
    reference: nn.Module,
    clock: Clock,
    example: Tensor,
) -> tuple[float, float]:
    """The largest of ascending scales whose network takes at most `most` times the reference.

    Gives the scale and its ratio. All are measured: latency does not always grow with width, as
    kernels like some widths better than others. Where none keeps the limit, the smallest.
    """
    different = {params(made): (scale, made) for scale in scales if (made := make(scale))}
    ordered = [different[size] for size in sorted(different)]
    reference_ms, *others = clock.rounds([reference, *(made for _, made in ordered)], example)
    found = [
        (scale, median(a / b for a, b in zip(times, reference_ms, strict=True)))
        for (scale, _), times in zip(ordered, others, strict=True)
    ]
    return next((pair for pair in reversed(found) if pair[1] <= most), found[0])


def trained(
    make: Make, task: Task, recipe: Training, seed: int, times: int = 1
) -> tuple[nn.Module, dict[str, Any]]:
    """A network trained from fresh weights: the last one, mean test accuracy and that of each."""
    found: list[float] = []
    for one in range(times):
        with global_seed(seed, _WEIGHTS, one):
            network = make()
        fit(network, task, recipe, mixed(seed, _WEIGHTS, one))
        found.append(evaluate(network, task, "test")["accuracy"])
    return network, {"accuracy": float(np.mean(found)), "each": found}


def params(network: nn.Module) -> int:
    """How many parameters a network has."""
    return sum(p.numel() for p in network.parameters())


def macs(network: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates of one input."""
    return count(network.eval(), example).macs


def conv(
    inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, relu: bool = True
) -> list[nn.Module]:
    """Convolution, batch normalisation and, unless told otherwise, ReLU."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [layer, nn.BatchNorm2d(outputs), *([nn.ReLU()] if relu else [])]


def even(width: float, step: int = 4) -> int:
    """A width as a multiple of `step`, at least one: finer than 16 comes nearer a latency."""
    return max(step, round(width / step) * step)


def sample(task: Task) -> Tensor:
    """A zero input of batch 1."""
    return torch.zeros(1, *task.shape)
