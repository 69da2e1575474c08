"""Training of a supernet, so that every candidate works with the shared weights.

What runs in each step is a path sampler's choice (`train.paths`). The default is the sandwich rule
(Yu & Huang, Universally Slimmable Networks, 2019) with in-place distillation (Yu et al., BigNAS,
2020): in each step the largest learns from the targets; the smallest and a few random ones learn
from the largest's outputs on the same batch, and from the targets too: with a
short training the largest has little to teach at first, and from it alone (`distil=1`, as published)
all of them learn slower. Measured on 2,000 images of CIFAR-10 at 16x16, 6 epochs, one seed, the
largest, a middling and the smallest ResNet reach 0.25, 0.23, 0.24 with `distil=1` and 0.38, 0.37,
0.36 with 0.5.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from espalier.errors import EspalierError
from espalier.space import Candidate, Space
from espalier.tasks import Task
from espalier.train import distributed, loop, losses
from espalier.train.paths import Pass, Paths, Sandwich, Uniform
from espalier.train.precision import Format, autocast
from espalier.train.recipe import Recipe
from espalier.train.sharing import Curriculum


class Shared(Protocol):
    """What is needed of a supernet, besides being a module: its space, and running a candidate."""

    @property
    def space(self) -> Space: ...

    def activate(self, candidate: Candidate) -> object: ...


def train_supernet(
    supernet: Any,
    task: Task,
    recipe: Recipe,
    seed: int,
    *,
    paths: Paths | None = None,
    random_subnets: int = 1,
    teacher: nn.Module | None = None,
    checkpoint: Path | None = None,
    progress: loop.Progress | None = None,
    after_step: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Trains shared weights in place; gives a row an epoch (epoch, loss, lr).

    `supernet` is an `nn.Module` with `.space` and `.activate(candidate)`; it is left with its
    largest candidate active, or one near it where constraints refuse that. `paths` says what runs in each step, by default
    `default_paths(supernet, random_subnets)`. The loss is that of the pass that teaches, the largest in a
    sandwich; the mean over all passes, where none does. With a `teacher`, a network on the same
    device, passes that learn from a teacher learn from its outputs.
    `after_step(epoch, step)` is called after each step of the optimiser.
    It computes on the device that the supernet is on. Checkpoints and errors are as in `fit`.
    """
    chosen = default_paths(supernet, random_subnets) if paths is None else paths
    shared: Shared = supernet
    space = shared.space
    trained = _together(supernet, chosen)
    steps = loop.steps_of(task, recipe.batch)

    def epoch_of(epoch: int, form: Format) -> loop.Step:
        chosen.begin(space, epoch, recipe.epochs, steps, seed)
        return _Step(supernet, task, recipe, chosen, teacher, form)

    settings = {**chosen.to_json(), "space": space.fingerprint}
    if teacher is not None:
        teacher.eval()
        settings["teacher"] = True
    history = loop.train(
        trained, task, recipe, seed, epoch_of, settings, checkpoint, progress, after_step
    )
    largest = space.corner(last=True)
    if not space.valid(largest)[0]:
        largest = space.repair(largest, np.random.default_rng(0))
    shared.activate(space.decode(largest)[0])
    return history


def default_paths(supernet: Any, random_subnets: int = 1) -> Paths:
    """The sandwich rule; for cells, whose operators have no largest, as many uniform paths a step,
    and on a supernet that can get more blocks of weights a late curriculum of sharing."""
    if hasattr(supernet, "grow"):
        return Curriculum.late(supernet)
    if getattr(supernet, "joins", None):
        return Uniform(2 + random_subnets)
    return Sandwich(random_subnets)


def _together(supernet: nn.Module, paths: Paths) -> nn.Module:
    """The supernet, with what its sampler learns, if it does."""
    if paths.module is None:
        return supernet
    return nn.ModuleDict({"supernet": supernet, "paths": paths.module})


class _Step:
    """The passes of a step, one after the other, each adding its gradients."""

    def __init__(
        self,
        supernet: nn.Module,
        task: Task,
        recipe: Recipe,
        paths: Paths,
        teacher: nn.Module | None,
        form: Format,
    ) -> None:
        self.supernet, self.task, self.recipe, self.paths = supernet, task, recipe, paths
        self.teacher, self.form = teacher, form

    def __call__(self, x: Tensor, y: Tensor, index: int) -> Tensor:
        passes = self.paths(index)
        wanted = self._taught(x, passes)
        told: list[Tensor] = []
        shown: Tensor | None = None
        for each in passes:
            each.apply(self.supernet, len(x))
            outputs = self._run(self.supernet, x)
            loss = self._loss(each, outputs, wanted, y)
            loss.backward()  # type: ignore[no-untyped-call]
            told.append(loss.detach())
            if each.teach:
                wanted = outputs.detach()
                shown = told[-1] if shown is None else shown
        found = torch.stack(told)
        self.paths.learned(index, distributed.mean(found).tolist())
        return found.mean() if shown is None else shown

    def _run(self, network: nn.Module, x: Tensor) -> Tensor:
        with autocast(self.form, x.device.type):
            outputs: Tensor = network(x)
        return outputs.float()

    def _taught(self, x: Tensor, passes: Any) -> Tensor | None:
        """The outputs of the teacher given, if a pass wants them."""
        if self.teacher is None or all(each.learn_from == "labels" for each in passes):
            return None
        with torch.no_grad():
            return self._run(self.teacher, x)

    def _loss(self, each: Pass, outputs: Tensor, wanted: Tensor | None, y: Tensor) -> Tensor:
        recipe = self.recipe
        if each.learn_from == "labels":
            loss = losses.hard(self.task, outputs, y, recipe.label_smoothing)
        elif wanted is None:
            raise EspalierError(
                "a pass that learns from a teacher needs a teaching pass before it in the step, or "
                "a network as teacher=: train_supernet got neither"
            )
        else:
            loss = losses.soft(outputs, wanted, y)
            if each.learn_from == "both":
                told = losses.hard(self.task, outputs, y, recipe.label_smoothing)
                loss = recipe.distil * loss + (1 - recipe.distil) * told
        extra = each.penalty()
        return loss if extra is None else loss + extra
