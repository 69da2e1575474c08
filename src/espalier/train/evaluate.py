"""How good a network is on a split, and batch-norm statistics set from training data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from espalier.errors import DataError
from espalier.tasks import Split, Task
from espalier.train.running import device_of, evaluating, laid_out
from espalier.train.seeds import generator


def evaluate(network: nn.Module, task: Task, split: Split, batch: int = 512) -> dict[str, float]:
    """The task's metrics over a whole split, in fp32; the network's mode is put back.

    It computes on the device that the network is on."""
    outputs, targets = [], []
    device = device_of(network)
    with evaluating(network), torch.inference_mode():
        for x, y in task.batches(split, batch):
            outputs.append(network(laid_out(network, x.to(device))).float().cpu())
            targets.append(y)
        return _told(task, task.measure(torch.cat(outputs), torch.cat(targets)))


def _told(task: Task, measured: Mapping[str, Any]) -> dict[str, float]:
    """What a task measured, as numbers. Errors: `DataError` where one of its metrics is missing."""
    missing = [m.name for m in task.metrics if m.name not in measured]
    if missing:
        raise DataError(
            f"the task {task.name} has the metrics {', '.join(m.name for m in task.metrics)}, but its "
            f"measure gives {', '.join(measured) or 'nothing'}"
        )
    return {name: float(value) for name, value in measured.items()}


def recalibrate(
    network: nn.Module, task: Task, batches: int = 4, batch: int = 256, seed: int = 0
) -> None:
    """Sets batch-norm statistics from a few training batches, not augmented, chosen by `seed`.

    Needed where weights are shared: the stored statistics are of other candidates (Yu & Huang,
    2019).
    """
    if any(isinstance(m, _BatchNorm) for m in network.modules()):
        inputs = calibration(task, batches, batch, seed)
        set_statistics(network, [laid_out(network, x.to(device_of(network))) for x in inputs])


def calibration(task: Task, batches: int, batch: int, seed: int) -> list[Tensor]:
    """A few training batches chosen by `seed`, for `set_statistics`."""
    found = task.batches("train", batch, generator(seed))
    return [x for x, _ in islice(found, batches)]


def set_statistics(network: nn.Module, inputs: Sequence[Tensor]) -> None:
    """Makes batch-norm statistics the average over `inputs`, a list of batches.

    Only the norms run as in training: dropout stays off.
    """
    norms = [m for m in network.modules() if isinstance(m, _BatchNorm)]
    momenta = [m.momentum for m in norms]
    with evaluating(network):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # torch's convention for a plain average
            norm.train()
        try:
            with torch.no_grad():
                for x in inputs:
                    network(x)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
