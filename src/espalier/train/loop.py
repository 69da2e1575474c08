"""The loop that every training shares: epochs, learning rate, checkpoints, progress.

What differs, one step on one batch, is a function given to it. Where torchrun started several
processes (`train.distributed`), each takes its share of every batch.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from espalier.errors import EspalierError
from espalier.tasks import Task
from espalier.train import checkpoint as checkpoints
from espalier.train import distributed
from espalier.train import optimiser as optimisers
from espalier.train.precision import Format, resolve
from espalier.train.recipe import Recipe
from espalier.train.running import device_of, laid_out, lay_out
from espalier.train.seeds import generator, global_seed

Progress = Callable[[int, int, str], None]
# Adds the gradients of one batch and gives the loss: (inputs, targets, step of the epoch).
Step = Callable[[Tensor, Tensor, int], Tensor]
# Called before an epoch with its number and the format to compute in; gives the step to take.
Epoch = Callable[[int, Format], Step]

_SECONDS_BETWEEN_CHECKPOINTS = 1.0
_SHUFFLE, _GLOBAL = 1, 2  # purposes of random streams


class Diverged(EspalierError):
    """The loss became NaN or infinite."""


def train(
    module: nn.Module,
    task: Task,
    recipe: Recipe,
    seed: int,
    epoch_of: Epoch,
    settings: Mapping[str, Any],
    checkpoint: Path | None,
    progress: Progress | None,
    after_step: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Trains in place and gives a row an epoch: epoch, loss (mean over batches), lr (the last).

    `settings` is what else the result depends on: a checkpoint of other settings is refused.
    `after_step(epoch, step)` is called after each step of the optimiser.
    """
    distributed.check_batch(recipe.batch)
    lay_out(module, next(iter(task.batches("train", 2)))[0])
    distributed.start_alike(module)
    optimiser = optimisers.make(module, recipe)
    identity = _identity(module, task, recipe, seed, settings)
    history: list[dict[str, Any]] = []
    chosen = resolve(recipe.precision, device_of(module).type)
    saved = None if checkpoint is None else distributed.read(checkpoint, device_of(module))
    if saved is not None and checkpoint is not None:
        checkpoints.check(checkpoint, saved.counters["identity"], identity)
        checkpoints.unpack(saved.tensors, module, optimiser)
        history, chosen = saved.counters["history"], saved.counters["precision"]
    written = time.monotonic()
    module.train()
    for epoch in range(len(history), recipe.epochs):
        with global_seed(seed, epoch, _GLOBAL):
            step = epoch_of(epoch, chosen)
            row = _epoch(module, task, recipe, seed, epoch, step, optimiser, after_step)
            history.append(row)
        distributed.average_buffers(module)
        if distributed.rank() > 0:
            continue  # the first process keeps the record
        last = epoch + 1 == recipe.epochs
        if checkpoint is not None and (
            last or time.monotonic() - written >= _SECONDS_BETWEEN_CHECKPOINTS
        ):
            counters = {"identity": identity, "history": history, "precision": chosen}
            checkpoints.write(checkpoint, checkpoints.pack(module, optimiser), counters)
            written = time.monotonic()
        if progress is not None:
            progress(epoch + 1, recipe.epochs, f"loss {history[-1]['loss']:.3f}")
    module.eval()
    return history


def _epoch(
    module: nn.Module,
    task: Task,
    recipe: Recipe,
    seed: int,
    epoch: int,
    step: Step,
    optimiser: torch.optim.SGD,
    after_step: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    steps = steps_of(task, recipe.batch)
    parameters = [p for p in module.parameters() if p.requires_grad]
    total, count, lr = 0.0, 0, 0.0
    device = device_of(module)
    order = generator(seed, epoch, _SHUFFLE)
    for x, y in task.batches("train", recipe.batch, order, recipe.augment):
        lr = optimisers.rate(recipe, epoch * steps + count, recipe.epochs * steps)
        for group in optimiser.param_groups:
            group["lr"] = lr
        rows, part = len(y), distributed.share(y)
        if rows < 2 * distributed.ranks():
            continue  # too few for all, as a last batch of one example is for one
        loss = float(
            step(laid_out(module, distributed.share(x).to(device)), part.to(device), count)
        )
        loss = distributed.combine(parameters, loss, len(part) / rows)
        if not math.isfinite(loss):
            raise Diverged(
                f"the loss is {loss} in epoch {epoch + 1}, step {count + 1}: the training diverged; "
                f"lower the learning rate (it was {lr:.3g}) or raise the warm-up"
            )
        nn.utils.clip_grad_norm_(parameters, recipe.clip)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if after_step is not None:
            after_step(epoch, count)
        total, count = total + loss, count + 1
    return {"epoch": epoch + 1, "loss": total / max(count, 1), "lr": lr}


def steps_of(task: Task, batch: int) -> int:
    """Number of batches in a training pass, which drops a last batch of one example a process."""
    whole, rest = divmod(task.size("train"), batch)
    return max(whole + (rest >= 2 * distributed.ranks()), 1)


def _identity(
    module: nn.Module, task: Task, recipe: Recipe, seed: int, settings: Mapping[str, Any]
) -> dict[str, Any]:
    shapes = [f"{name}{tuple(t.shape)}" for name, t in module.state_dict().items()]
    return {
        "weights": hashlib.sha256("\n".join(shapes).encode()).hexdigest()[:16],
        "task": task.fingerprint,
        "seed": seed,
        **asdict(recipe),
        **settings,
        **({"processes": distributed.ranks()} if distributed.ranks() > 1 else {}),
    }
