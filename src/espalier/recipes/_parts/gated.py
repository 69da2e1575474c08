"""What the recipes of pruning by gradient share: the model, its family, allocations to compare with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from espalier.compress import Pretrained, Widths
from espalier.compress.gates import Gated
from espalier.compress.importance import by_unit
from espalier.costs import count
from espalier.recipes._parts.small_cnn import trained
from espalier.solvers.prune import Budget, TopUnits
from espalier.solvers.prune.methods import SETTINGS
from espalier.solvers.relax import Settings
from espalier.space import Candidate
from espalier.tasks import Task
from espalier.train import Recipe as Training
from espalier.train import evaluate, fit
from espalier.train.seeds import generator, mixed

_FINE, _SCORES = 51, 52  # purposes of random streams


@dataclass(frozen=True)
class Bed:
    """A task, the network that is trained on it, its training, and how it is trained on."""

    task: str = "digits:train=900,validation=200,test=697"
    widths: tuple[int, ...] = (8, 12, 16)
    blocks: int = 1
    training: Training = field(default_factory=lambda: Training(epochs=30, lr=0.1))
    search: Settings = field(default_factory=lambda: replace(SETTINGS, epochs=10, lr=0.05))
    fine: Training = field(default_factory=lambda: Training(epochs=10, lr=0.05))

    def original(self, task: Task, seed: int) -> nn.Module:
        """The trained network."""
        return trained(task, self.widths, self.blocks, self.training, seed)

    def finetuned(self, network: nn.Module, task: Task, seed: int, epochs: int) -> float:
        """Trains a network on, and tests it."""
        fit(network, task, replace(self.fine, epochs=epochs), mixed(seed, _FINE))
        return evaluate(network, task, "test")["accuracy"]


SMOKE = Bed(
    "digits:train=64,validation=32,test=32",
    widths=(6, 8),
    training=Training(epochs=1, lr=0.1, batch=32),
    search=replace(SETTINGS, epochs=1, batch=32),
    fine=Training(epochs=1, lr=0.02, batch=32),
)
LARGE = Bed(
    "cifar10",
    (16, 32, 64),
    3,
    Training(epochs=100, batch=128, lr=0.1),
    replace(SETTINGS, epochs=20, batch=128),
    Training(epochs=40, batch=128, lr=0.02),
)
# where cuts still cost: images of objects, and a network that has not learned them by heart
CIFAR = Bed(
    "cifar10:size=16,train=3000,validation=500,test=2000",
    (16, 32, 64),
    training=Training(epochs=10, lr=0.1),
    search=replace(SETTINGS, epochs=6),
    fine=Training(epochs=6, lr=0.02),
)
BEDS: Mapping[str, Bed] = {"smoke": SMOKE, "cpu": Bed(), "cifar": CIFAR, "gpu": LARGE}


def cuttable(model: nn.Module, task: Task, multiple: int = 1) -> Pretrained:
    """The model as a family of its widths, channel by channel or by so many at once."""
    widths = Widths(multiple=multiple, steps=10_000)
    return Pretrained(model, torch.zeros(2, *task.shape), (widths,))


def macs(network: nn.Module, task: Task) -> int:
    """Multiply-accumulates of one input."""
    return count(network, torch.zeros(1, *task.shape)).macs


def l1(family: Pretrained) -> dict[str, Tensor]:
    """The mean absolute weight of what makes each unit, by decision (Li et al., 2017)."""
    modules = dict(family.model.named_modules())
    found = {}
    for cut in family.cuts:
        for name, group in getattr(cut, "groups", {}).items():
            made = [m for m in group.members if not m.consumed and m.tensor == "weight"]
            weights = [(getattr(modules[m.path], m.tensor).detach().abs(), m) for m in made]
            kept = [by_unit(w, m) for w, m in weights if w.dim() > 1]
            found[f"width:{name}"] = torch.stack(kept).mean(0)
    return found


def evenly(budget: Budget) -> Candidate:
    """The same share of every group, as much as the budget allows."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        fits = budget.over(np.maximum(middle, budget.least)) <= 0
        low, high = (middle, high) if fits else (low, middle)
    return budget.settle(np.maximum(low, budget.least))


def best(gated: Gated, budget: Budget, scores: Mapping[str, Tensor]) -> Candidate:
    """The units with the best scores over all groups, as many as the budget allows."""
    gates = TopUnits(budget)
    logits = gates.start(gated, gated.mixable, generator(0, _SCORES))
    with torch.no_grad():
        for name, found in logits.items():
            found.copy_(scores[name])
    gates.after_step(logits, {})
    kept = gates.kept(logits)
    return budget.settle(np.array([float(kept[n].detach()) / gated.units[n] for n in budget.names]))


def cut(family: Pretrained, scores: Mapping[str, Tensor], candidate: Candidate) -> nn.Module:
    """The family's network of a candidate, the units with the lowest scores gone."""
    return family.with_scores({n.partition(":")[2]: s for n, s in scores.items()}).build(candidate)


def shown(candidate: Candidate) -> dict[str, Any]:
    """Widths by layer."""
    return {name.partition(":")[2]: option for name, option in candidate.items()}
