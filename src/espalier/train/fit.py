"""Training of one network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from espalier.tasks import Task
from espalier.train import loop, losses
from espalier.train.precision import Format, autocast
from espalier.train.recipe import Recipe
from espalier.train.running import laid_out


def fit(
    network: nn.Module,
    task: Task,
    recipe: Recipe,
    seed: int,
    *,
    teacher: nn.Module | None = None,
    checkpoint: Path | None = None,
    progress: loop.Progress | None = None,
) -> list[dict[str, Any]]:
    """Trains a network in place, from the weights it has; gives a row an epoch (epoch, loss, lr).

    With a `teacher` the loss is mixed with the cross entropy to its outputs, by `recipe.distil`.
    With a `checkpoint` path, a training that was killed goes on from it and ends in the same bits.
    It computes on the device that the network is on; the teacher must be on the same.
    The result is a function of the network, the task, the recipe, the seed and torch's threads.
    Errors: `Diverged` when the loss is NaN; `StudyError` for a checkpoint of another training.
    """
    if teacher is not None:
        teacher.eval()

    def epoch_of(epoch: int, chosen: Format) -> loop.Step:
        def step(x: Tensor, y: Tensor, index: int) -> Tensor:
            with autocast(chosen, x.device.type):
                outputs = network(x)
            loss = losses.hard(task, outputs.float(), y, recipe.label_smoothing)
            if teacher is not None:
                with torch.no_grad(), autocast(chosen, x.device.type):
                    wanted = teacher(laid_out(teacher, x))
                matched = losses.soft(outputs.float(), wanted.float(), y)
                loss = (1 - recipe.distil) * loss + recipe.distil * matched
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.detach()

        return step

    settings = {"method": "fit" if teacher is None else "fit with a teacher"}
    return loop.train(network, task, recipe, seed, epoch_of, settings, checkpoint, progress)
