"""What workers do: score one candidate, or train one to the end and keep its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from espalier import train
from espalier.estimators import Estimator
from espalier.flows.weights import derive, save_weights, weights_path
from espalier.nets import Family
from espalier.problem import Reading
from espalier.space import Candidate
from espalier.tasks import Task
from espalier.train import Recipe

Start = Literal["supernet", "scratch"]


@dataclass
class Score:
    """Scores one candidate with an estimator."""

    estimator: Estimator

    def __call__(self, candidate: Candidate) -> dict[str, Reading]:
        """The estimator's metrics of one candidate."""
        return self.estimator.estimate([candidate]).readings()[0]


@dataclass
class Finish:
    """Trains one candidate to the end and writes its weights; gives its validation metrics."""

    family: Family
    task: Task
    recipe: Recipe
    seed: int
    start: Start
    folder: Path

    def __call__(self, candidate: Candidate) -> dict[str, Reading]:
        """Validation metrics after training, named `<metric>_validation`."""
        seed = derive(self.seed, candidate.id, self.start)
        torch.manual_seed(seed)
        if self.start == "supernet":
            network: nn.Module = self.family.extract(candidate)  # type: ignore[attr-defined]
        else:
            network = self.family.build(candidate)
        weights = weights_path(self.folder, candidate, self.start)
        train.fit(network, self.task, self.recipe, seed, checkpoint=weights.with_suffix(".partial"))
        measured = train.evaluate(network, self.task, "validation")
        save_weights(network, weights)
        for leftover in weights.parent.glob(weights.stem + ".partial*"):
            leftover.unlink()
        units = {m.name: m.unit for m in self.task.metrics}
        return {
            f"{name}_validation": Reading(value, units.get(name, ""), "measured", "validation")
            for name, value in measured.items()
        }
