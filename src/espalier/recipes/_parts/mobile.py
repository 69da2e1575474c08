"""What the searches among mobile blocks share: devices, training one network alone, timing several."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from espalier.costs import OnnxRuntime, PredictedLatency, count, layers, machine
from espalier.export import to_onnx
from espalier.nets import Supernet
from espalier.nets.multipath import MultiPath
from espalier.solvers.relax.expected import Expected, Price, counted, expected_cost, latency_price
from espalier.space import Candidate
from espalier.tasks import Task
from espalier.train import Recipe as Training
from espalier.train import evaluate, fit
from espalier.train.seeds import global_seed, mixed

_ALONE, _ORDER = 21, 22  # purposes of random streams
# the smallest network that has all kinds of blocks, for trials of the machinery
SMALL: Mapping[str, Any] = {"depth": (2, 1, 1), "stem": 8, "widths": (8, 8, 16), "head": 16}


def multipath(task: Task, seed: int, **options: Any) -> MultiPath:
    """The supernet of complete operators, its weights decided by the seed."""
    with global_seed(seed):
        return MultiPath(task.shape, task.classes, **options)


class Device(ABC):
    """Where networks of one family run: what a unit of them takes, and a whole network."""

    name: str
    overhead: float = 0.0

    @abstractmethod
    def price(self, family: Supernet) -> Price:
        """Milliseconds of a unit, of what the table knows."""

    @abstractmethod
    def measured(
        self, family: Supernet, candidates: Sequence[Candidate], rounds: int
    ) -> dict[str, Any]:
        """`ms`: a number a candidate, end to end; and how it was obtained."""

    def expected(self, family: Supernet) -> Expected:
        """The table as an expected cost, the overhead of a network included."""
        return expected_cost(family, self.price(family), constant=self.overhead)


class Counted(Device):
    """A made-up device without overhead: a unit takes its multiply-accumulates, in millions.

    For trials of the machinery, and where numbers must not hang on the machine.
    """

    name = "counted"

    def price(self, family: Supernet) -> Price:
        """A millionth of the multiply-accumulates."""
        macs = counted("macs")
        return lambda module, shape: macs(module, shape) / 1e6

    def measured(
        self, family: Supernet, candidates: Sequence[Candidate], rounds: int
    ) -> dict[str, Any]:
        """What the table says of networks, counted end to end."""
        networks = [family.build(candidate) for candidate in candidates]
        ms = [count(network, family.example(1)).macs / 1e6 for network in networks]
        return {"ms": ms, "how": "counted multiply-accumulates"}


class Wide(Device):
    """A made-up accelerator, by formula: pointwise work is nearly free, kernels above 3 are dear.

    It multiplies channels with one another in wide units, at `pointwise` of the time of other work,
    and runs a larger kernel as that many small ones. Every convolution costs a launch. `scale`
    milliseconds are a million multiply-accumulates of a kernel of 3.
    """

    name = "a made-up accelerator for pointwise work and kernels of 3"

    def __init__(self, scale: float = 1.0, pointwise: float = 0.05, launch: float = 0.002) -> None:
        self.scale, self.pointwise, self.launch = scale, pointwise, launch

    def price(self, family: Supernet) -> Price:
        """Milliseconds by the formula."""
        return lambda module, shape: self._ms(module, torch.zeros(1, *shape))

    def _ms(self, network: nn.Module, x: Tensor) -> float:
        return self.scale * sum(map(self._layer, layers(network, x)))

    def _layer(self, row: Mapping[str, Any]) -> float:
        if row["kind"] not in ("conv", "depthwise", "linear"):
            return 0.0
        side = row["kernel"] or 1
        side = side if isinstance(side, int) else max(side)
        each = self.pointwise if side == 1 else math.ceil(side / 3) ** 2
        return self.launch + float(row["macs"]) / 1e6 * each

    def measured(
        self, family: Supernet, candidates: Sequence[Candidate], rounds: int
    ) -> dict[str, Any]:
        """What the formula gives for whole networks."""
        example = family.example(1)
        ms = [self._ms(family.build(candidate), example) for candidate in candidates]
        return {"ms": ms, "how": "by formula, of the whole network"}


class Processor(Device):
    """This machine's processor in ONNX Runtime: a table of pieces, measured when first asked for."""

    def __init__(self, runtime: OnnxRuntime, seed: int) -> None:
        self.runtime, self.seed, self.name = runtime, seed, runtime.name
        self._predicted: PredictedLatency | None = None

    def calibrated(self, family: Supernet) -> PredictedLatency:
        """The table, measured once."""
        if self._predicted is None:
            self._predicted = PredictedLatency(family, self.runtime)
            self._predicted.calibrate(self.seed)
            self.overhead = float(self._predicted.error["overhead_ms"])
        return self._predicted

    def price(self, family: Supernet) -> Price:
        """Milliseconds of a unit by the table."""
        return latency_price(self.calibrated(family))

    def expected(self, family: Supernet) -> Expected:
        """The table, which knows the overhead only once it is measured."""
        self.calibrated(family)
        return super().expected(family)

    def measured(
        self, family: Supernet, candidates: Sequence[Candidate], rounds: int
    ) -> dict[str, Any]:
        """Medians over rounds in which every network is timed once, in an order drawn anew."""
        x = self.runtime.batched(family.example(1))
        with global_seed(self.seed):
            models = [to_onnx(family.build(candidate), x, fast=True) for candidate in candidates]
        start, rng = machine.snapshot(), np.random.default_rng([self.seed, _ORDER])
        found: list[list[float]] = [[] for _ in models]
        for _ in range(rounds):
            for i in rng.permutation(len(models)):
                found[i].append(self.runtime.quick(models[i], x).median_ms)
        return {
            "ms": [median(times) for times in found],
            "rounds": found,
            "load": machine.load_between(start, machine.snapshot()),
            "how": f"measured in {self.runtime.name}, median of {rounds} rounds, interleaved",
        }

    def about(self) -> dict[str, Any]:
        """How well the table predicts whole networks, and what disturbed it."""
        if self._predicted is None:
            return {}
        shown = ("spearman", "median_error", "units", "units_measured", "seconds", "load", "busy")
        return {name: self._predicted.error[name] for name in shown}


@dataclass(frozen=True)
class Alone:
    """How one network is trained by itself: several times, from other weights."""

    recipe: Training
    times: int = 1

    def __call__(
        self, family: Supernet, candidate: Mapping[str, Any], task: Task, seed: int
    ) -> dict[str, Any]:
        """Mean test accuracy, and that of each training."""
        chosen, found = family.space.candidate(candidate), []
        for one in range(self.times):
            with global_seed(seed, _ALONE, one):
                network = family.build(chosen)
            fit(network, task, self.recipe, mixed(seed, _ALONE, one))
            found.append(evaluate(network, task, "test")["accuracy"])
        return {"accuracy": float(np.mean(found)), "each": found}


def even(expected: Expected) -> float:
    """The expected cost where all options of a decision are alike."""
    chances = {name: torch.ones(len(o)) / len(o) for name, o in expected.options.items()}
    return float(expected(chances))
