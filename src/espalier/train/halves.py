"""A task's training examples in two disjoint parts: one for weights, one for the architecture."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from espalier.errors import DataError
from espalier.tasks import Split, Task, TensorTask
from espalier.train.seeds import generator

_HALVES = 7  # purpose of the random stream
_READ = 1024  # examples read at a time


def halves(task: Task, share: float, seed: int = 0) -> tuple[Task, Task]:
    """Two tasks, the second with `share` of train, the first with the rest; chosen by `seed`.

    Where targets are class labels, each class is divided in proportion. Validation and test are
    those of the task in both. Errors: `DataError` where a part would have fewer than 2 examples.
    """
    found = task if isinstance(task, TensorTask) else _Held(task)
    inputs, targets = found._splits["train"]
    second = _chosen(targets, share, generator(seed, _HALVES))
    for what, count in (("architecture", int(second.sum())), ("weights", int((~second).sum()))):
        if count < 2:
            raise DataError(
                f"a share of {share:g} of {len(targets)} training examples leaves {count} to the "
                f"{what}: both parts need 2 or more"
            )
    return _part(found, inputs, targets, ~second), _part(found, inputs, targets, second)


def _chosen(targets: Tensor, share: float, order: torch.Generator) -> Tensor:
    """Which examples are in the second part, `(n,)` bool."""
    shuffled = torch.randperm(len(targets), generator=order)
    if targets.ndim == 1 and not targets.is_floating_point():
        shuffled = shuffled[torch.argsort(targets[shuffled], stable=True)]
    # evenly along the shuffled classes: each class gives its share, up to one example
    rank = torch.arange(len(targets) + 1, dtype=torch.float64)
    steps = torch.floor(rank * share + 1e-9)
    out = torch.empty(len(targets), dtype=torch.bool)
    out[shuffled] = steps[1:] > steps[:-1]
    return out


def _part(task: TensorTask, inputs: Tensor, targets: Tensor, rows: Tensor) -> Task:
    out = copy.copy(task)  # with the normalisation of the whole
    out._splits = {**task._splits, "train": (inputs[rows], targets[rows])}
    out._fingerprint = ""
    return out


class _Held(TensorTask):
    """Another kind of task with its examples read into memory once; nothing is augmented."""

    def __init__(self, task: Task) -> None:
        self._task, self.metrics = task, task.metrics
        splits: Mapping[Split, tuple[Tensor, Tensor]] = {
            "train": _read(task, "train"),
            "validation": _read(task, "validation"),
            "test": (torch.zeros(1, *task.shape), torch.zeros(1)),  # is not to be read here
        }
        super().__init__(splits, task.classes, task.name)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self._task.loss(outputs, targets)

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        return self._task.measure(outputs, targets)


def _read(task: Task, split: Split) -> tuple[Tensor, Tensor]:
    pairs = list(task.batches(split, _READ))
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])
