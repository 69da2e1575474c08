"""Losses: against the targets, and against another network's outputs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from espalier.errors import EspalierError
from espalier.tasks import Task


def hard(task: Task, outputs: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """The task's loss; with smoothing, mixed with the cross entropy to the uniform distribution.

    For cross entropy that is label smoothing (Szegedy et al., 2016).
    """
    loss = task.loss(outputs, targets)
    if smoothing == 0:
        return loss
    if targets.is_floating_point():
        raise EspalierError(
            f"label_smoothing needs class labels, the targets of {task.name!r} are "
            f"{targets.dtype}: set it to 0"
        )
    uniform = -functional.log_softmax(outputs, dim=1).mean()
    return (1 - smoothing) * loss + smoothing * uniform


def soft(outputs: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
    """How far outputs are from a teacher's (Hinton et al., 2015), at temperature 1.

    Cross entropy between the distributions for class labels, squared error for other targets.
    """
    if targets.is_floating_point():
        return functional.mse_loss(outputs, teacher)
    return functional.cross_entropy(outputs, torch.softmax(teacher, dim=1))
