"""The optimiser of a recipe and its learning rate at every step."""

from __future__ import annotations

import math

import torch
from torch import nn

from espalier.train.recipe import Recipe


def make(module: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    """SGD with Nesterov momentum; biases and norms (one dimension) do not decay."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.SGD(
        [g for g in groups if g["params"]],
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.momentum > 0,
        fused=True,
    )
    if recipe.momentum > 0:
        # torch's fused step can't start the momentum of some weights later than that of others, as
        # single paths through a supernet do
        for parameter in trained:
            optimiser.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimiser


def rate(recipe: Recipe, step: int, steps: int) -> float:
    """The learning rate at `step` of `steps`: linear warm-up, then a half cosine to 0."""
    warm = recipe.warmup * steps
    if step + 1 <= warm:
        return recipe.lr * (step + 1) / warm
    done = (step + 0.5 - warm) / (steps - warm)  # the middle of the step, so the last is not 0
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * done))
