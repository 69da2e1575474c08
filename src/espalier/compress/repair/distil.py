"""The loss of learning from another network's outputs (Hinton, Vinyals & Dean, Distilling the
Knowledge in a Neural Network, 2015, https://arxiv.org/abs/1503.02531)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from espalier.tasks import Task
from espalier.train import losses
from espalier.train.precision import Format, autocast
from espalier.train.recipe import Recipe
from espalier.train.running import laid_out


def distance(outputs: Tensor, wanted: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """How far outputs are from a teacher's: a scalar to be minimised.

    Class labels: Kullback-Leibler divergence of the softened distributions, in nats, times the
    temperature squared, so that gradients keep their size. Several labels an example, as in text or
    segmentation: the mean over all of them. Other targets, and outputs that are one number for each
    label: the mean squared error.
    """
    if targets.is_floating_point() or outputs.numel() == len(targets):
        return functional.mse_loss(outputs, wanted)
    ours, theirs = (
        functional.log_softmax(losses.by_label(t, targets) / temperature, dim=1)
        for t in (outputs, wanted)
    )
    apart = functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)
    return apart * temperature**2


@dataclass
class Teaching:
    """The loss on one batch: `labels` of it is the task's, the rest the distance to the original's."""

    task: Task
    original: nn.Module | None
    recipe: Recipe
    temperature: float
    labels: float
    form: Format

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """A scalar with its graph, for inputs and targets on the model's device."""
        with autocast(self.form, x.device.type):
            outputs = model(x)
        outputs = outputs.float()
        total: Tensor = outputs.new_zeros(())
        if self.labels > 0:
            told = losses.hard(self.task, outputs, y, self.recipe.label_smoothing)
            total = total + self.labels * told
        if self.original is not None and self.labels < 1:
            with torch.no_grad(), autocast(self.form, x.device.type):
                wanted = self.original(laid_out(self.original, x))
            apart = distance(outputs, wanted.float(), y, self.temperature)
            total = total + (1 - self.labels) * apart
        return total
