"""Fine-tuning of a cut model: it learns from the original and from the labels, within a time."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from espalier.compress.repair.distil import Teaching
from espalier.compress.repair.optimise import RECIPES, Optimiser
from espalier.compress.repair.tuning import Clock, Run
from espalier.errors import EspalierError
from espalier.tasks import Task
from espalier.train import loop
from espalier.train.precision import resolve
from espalier.train.recipe import Recipe
from espalier.train.running import device_of

_UNBOUNDED = 1_000_000  # epochs


def finetune(
    model: nn.Module,
    original: nn.Module | None,
    task: Task,
    recipe: Recipe | None = None,
    *,
    seconds: float | None = None,
    temperature: float = 2.0,
    share_of_labels: float = 0.5,
    patience: int | None = None,
    optimiser: Optimiser | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    progress: loop.Progress | None = None,
    clock: Clock = time.monotonic,
) -> dict[str, Any]:
    """Trains a model in place from the weights it has; gives what happened as plain JSON.

    The loss is `share_of_labels` of the task's and the rest the distance to the original's outputs
    at a `temperature`; without an original, the task's alone. Each epoch is validated; the best
    weights are kept, those from before included, so that validation is never worse than it was. It
    ends after the recipe's epochs, `patience` validations without a better one, or `seconds`, the
    validations counted; the learning rate falls to 0 by whichever of the first and last is nearer.
    Without a recipe there are 10 epochs, or as many as fit in `seconds`. Without a patience it is
    10 validations and half of the training: what is learned late, at low rates, is waited for.

    Weights that are 0 in sparse layers (one in 20 or more is 0) stay 0.
    `optimiser` is that of the recipe's numbers: by default SGD; without a recipe, AdamW for models
    without batch normalisation. With a `checkpoint` path a run that was killed goes on from its
    last epoch and, where `seconds` is None, ends in the same bits. `progress` is told epochs, or
    seconds where these are limited. `clock` tells the seconds: with `time.process_time` they are the
    processor's, so that what else runs on the machine costs the training nothing.
    The result: `history` (a row an epoch: loss, lr, steps and the validation metrics), `before`,
    `after`, `best_epoch` (0: before), `stopped` ("epochs", "patience", "time" or "diverged") and
    `seconds`.
    Errors: `EspalierError` for a number out of range; `StudyError` for another run's checkpoint.
    """
    rules = (
        ("seconds", seconds is None or seconds > 0, seconds, "above 0, or None"),
        ("temperature", temperature > 0, temperature, "above 0"),
        ("share_of_labels", 0 <= share_of_labels <= 1, share_of_labels, "in 0..1"),
        ("patience", patience is None or patience >= 1, patience, "1 or more, or None"),
        ("optimiser", optimiser in (None, *RECIPES), optimiser, "sgd or adamw"),
    )
    for name, kept, value, rule in rules:
        if not kept:
            raise EspalierError(f"{name} of a fine-tuning must be {rule}, got {value!r}")
    if optimiser is None:
        normed = any(isinstance(m, _BatchNorm) for m in model.modules())
        optimiser = "sgd" if normed or recipe is not None else "adamw"
    chosen = RECIPES[optimiser] if recipe is None else recipe
    if recipe is None and seconds is not None:
        chosen = replace(chosen, epochs=_UNBOUNDED)
    labels = 1.0 if original is None else share_of_labels
    form = resolve(chosen.precision, device_of(model).type)
    teaching = Teaching(task, original, chosen, temperature, labels, form)
    run = Run(model, teaching, optimiser, seconds, patience, seed, clock)
    run.resume(checkpoint)
    run.train(checkpoint, progress)
    return run.result()
