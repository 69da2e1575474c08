"""What workers do: score one candidate, or train one to the end and keep its weights."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from espalier import train
from espalier.estimators import Estimator
from espalier.nets import Family
from espalier.problem import Reading
from espalier.space import Candidate
from espalier.tasks import Task
from espalier.train import Recipe

Start = Literal["supernet", "scratch"]


def derive(seed: int, *names: str) -> int:
    """A seed for a part of the work, the same for the same names (63 bits)."""
    digest = hashlib.sha256("/".join([str(seed), *names]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


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
        state = {k: v.detach().clone().contiguous() for k, v in network.state_dict().items()}
        weights.parent.mkdir(parents=True, exist_ok=True)
        temporary = weights.with_suffix(".writing")
        save_file(state, temporary)
        temporary.replace(weights)
        for leftover in weights.parent.glob(weights.stem + ".partial*"):
            leftover.unlink()
        units = {m.name: m.unit for m in self.task.metrics}
        return {
            f"{name}_validation": Reading(value, units.get(name, ""), "measured", "validation")
            for name, value in measured.items()
        }


def weights_path(folder: Path, candidate: Candidate, start: str) -> Path:
    """Where the trained weights of a candidate stand."""
    return folder / "weights" / f"{candidate.id}-{start}.safetensors"


def trained_network(family: Family, candidate: Candidate, weights: Path) -> nn.Module:
    """The plain network of a candidate with trained weights, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = family.build(candidate)
    network.load_state_dict(load_file(weights))
    return network.eval()
