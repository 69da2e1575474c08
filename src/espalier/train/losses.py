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
    uniform = -functional.log_softmax(by_label(outputs, targets), dim=1).mean()
    return (1 - smoothing) * loss + smoothing * uniform


def soft(outputs: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
    """How far outputs are from a teacher's (Hinton et al., 2015), at temperature 1.

    Cross entropy between the distributions for class labels, of which an example may have several,
    squared error for other targets and for outputs that are one number for each label.
    """
    if targets.is_floating_point() or outputs.numel() == len(targets):
        return functional.mse_loss(outputs, teacher)
    ours, theirs = (by_label(t, targets) for t in (outputs, teacher))
    return functional.cross_entropy(ours, torch.softmax(theirs, dim=1))


def by_label(outputs: Tensor, targets: Tensor) -> Tensor:
    """Logits as `(labels, classes)`: of outputs `(b, classes)`, `(b, classes, *places)`, or with the
    classes last, `(b, *places, classes)` and `(b, places * classes)`.

    Targets that are no class numbers (a mark for each class, answers of which the outputs are no
    multiple) leave a row an example.
    """
    if outputs.numel() == targets.numel() or outputs.numel() % targets.numel():
        return outputs.flatten(1)
    if outputs.ndim == targets.ndim + 1 and outputs.shape[2:] == targets.shape[1:]:
        outputs = outputs.movedim(1, -1)
    return outputs.reshape(targets.numel(), -1)
