"""sharpDARTS: Max-W weights over a grid of layers, widths and reuse; cosine power annealing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from espalier import tasks
from espalier.nets.elastic import OneOf
from espalier.nets.supernet import Supernet
from espalier.recipes import Recipe
from espalier.solvers.relax import FirstOrder, Magnitude, MaxWeight, Settings, Softmax, relax
from espalier.space import Candidate, choice
from espalier.tasks import Task
from espalier.train import Recipe as Training
from espalier.train import evaluate, fit
from espalier.train.schedules import cosine_power
from espalier.train.seeds import global_seed, mixed

_ORDER = 2  # of the annealing, as published for CIFAR


class SharpSepConv(nn.Module):
    """Two separable convolutions `(b, c, h, w)` to the same, `middle` channels between them.

    Run `times` times over with the same weights, each time added to what came in.
    """

    def __init__(self, channels: int, middle: int, times: int) -> None:
        super().__init__()
        self.first = _separable(channels, middle)
        self.second = _separable(middle, channels)
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = x + self.second(self.first(x))
        return x


def _separable(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
    )


class HyperCuboid(Supernet):
    """A grid of layers x widths x reuse: `layerN` is "none" or "WIDTHxREUSE"; weights are its own.

    A path through the grid picks a node of every layer.
    """

    def __init__(
        self,
        shape: Sequence[int],
        classes: int,
        layers: int = 4,
        widths: Sequence[int] = (4, 8, 16),
        reuse: Sequence[int] = (1, 2),
        channels: int = 16,
    ) -> None:
        super().__init__(shape, classes)
        self.stem = nn.Sequential(
            nn.Conv2d(self.shape[0], channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        )
        nodes = [(width, times) for times in reuse for width in widths]
        for i in range(layers):
            of: dict[Any, nn.Module] = {"none": nn.Identity()}
            of |= {f"{w}x{t}": SharpSepConv(channels, w, t) for w, t in nodes}
            self.add_module(f"layer{i}", OneOf(choice(f"layer{i}", *of), of))
        self.head = nn.Sequential(
            nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)
        )


@dataclass(frozen=True)
class Plan:
    """How long to search, how to train the path found, how often, and sizes of the task."""

    search: Settings
    alone: Training
    trainings: int = 3
    data: str = "digits:train=1100,validation=297,test=400"


PLANS = {
    "smoke": Plan(
        Settings(epochs=1, batch=32),
        Training(epochs=1),
        trainings=1,
        data="digits:train=64,validation=40,test=40",
    ),
    "cpu": Plan(Settings(epochs=15, arch_lr=0.01), Training(epochs=10)),
    "gpu": Plan(Settings(epochs=100, arch_lr=3e-3), Training(epochs=60), trainings=5),
}


def run(scale: str, seed: int, out: Path | None) -> dict[str, Any]:
    """The likeliest path under Max-W and under plain softmax, each trained alone."""
    plan = PLANS[scale]
    task = tasks.make(plan.data)
    annealed = cosine_power(plan.search.lr, plan.search.lr_min, order=_ORDER)
    settings = replace(plan.search, schedule=annealed)
    found = {
        "max_w": searched(task, plan, settings, MaxWeight(), seed),
        "softmax": searched(task, plan, settings, Softmax(), seed),
    }
    off = max(
        abs(annealed(i / 100) - closed_form(i / 100, plan.search.lr, plan.search.lr_min))
        for i in range(101)
    )
    accuracy = {name: one["accuracy"] for name, one in found.items()}
    return {
        "searches": found,
        "check": {
            "accuracy": accuracy,
            "params": {name: one["params"] for name, one in found.items()},
            "schedule_error": off,
            "holds": accuracy["max_w"] > accuracy["softmax"] and off < 1e-12,
        },
    }


def searched(
    task: Task, plan: Plan, settings: Settings, relaxation: Any, seed: int
) -> dict[str, Any]:
    """One search; the path of the largest weights, trained alone: its mean accuracy on test."""
    with global_seed(seed):
        supernet = HyperCuboid(task.shape, task.classes)
    found = relax(
        supernet,
        task,
        relaxation=relaxation,
        rule=FirstOrder(),
        selection=Magnitude(),
        settings=settings,
        seed=seed,
    )
    reached = [
        trained(supernet, found.candidate, task, plan.alone, mixed(seed, i))
        for i in range(plan.trainings)
    ]
    return {
        "path": found.candidate.to_json(),
        "accuracy": sum(reached) / len(reached),
        "accuracies": reached,
        "params": sum(p.numel() for p in supernet.build(found.candidate).parameters()),
        "seconds": found.seconds,
        "monitor": found.monitor,
    }


def trained(
    supernet: HyperCuboid, path: Candidate, task: Task, recipe: Training, seed: int
) -> float:
    """Test accuracy of a path from fresh weights."""
    with global_seed(seed):
        network = supernet.build(path)
    fit(network, task, recipe, seed)
    return evaluate(network, task, "test")["accuracy"]


def closed_form(progress: float, high: float, low: float, order: float = _ORDER) -> float:
    """Cosine power annealing as published: y = p^(c + 1), c = (1 + cos(pi progress)) / 2, scaled."""
    reach: float = order ** ((1 + math.cos(math.pi * progress)) / 2 + 1)
    return low + (high - low) * (reach - order) / (order**2 - order)


RECIPE = Recipe(
    name="sharpdarts",
    title="sharpDARTS: Max-W, a differentiable grid, cosine power annealing",
    source="Hundt, Jain & Hager, sharpDARTS: Faster and More Accurate Differentiable Architecture "
    "Search, 2019 (https://arxiv.org/abs/1903.09900)",
    parts=(
        "space: a grid of layers x widths x reuse of separable convolutions, 7 nodes in 4 layers",
        "relaxation: Max-W, the largest weight of a layer raised to 1",
        "rule: first order; the rate of the weights by cosine power annealing of order 2",
        "selection: the path of the largest weights",
        "baseline: plain softmax; both paths trained alone",
    ),
    works_when="On digits the path found under Max-W is more accurate on test than the one found under "
    "plain softmax, both trained alone in the same way; the annealing is its closed form to 1e-12.",
    run=run,
    text="""
A node of the grid is a pair of separable convolutions with 4, 8 or 16 channels between them, run once
or twice with the same weights; a layer that takes "none" shortens the network. As published the grid
is a graph whose path is chosen by the product of its arcs' weights: here a layer's weights stand for
the arcs into it, so the best path is the best node of each layer. Paths are trained alone three times
each; their mean test accuracies are compared.
""",
)
