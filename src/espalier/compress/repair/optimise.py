"""Optimisers of a fine-tuning: what they are, what a checkpoint keeps of them, what they may not move."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from espalier.train import optimiser as optimisers
from espalier.train.recipe import Recipe

Optimiser = Literal["sgd", "adamw"]
RECIPES: dict[Optimiser, Recipe] = {
    "sgd": Recipe(epochs=10, lr=0.02),
    "adamw": Recipe(epochs=10, lr=1e-3, weight_decay=0.01),
}
_SPARSE = 0.05  # share of zeros from which a layer is sparse on purpose


def make(module: nn.Module, recipe: Recipe, kind: Optimiser) -> torch.optim.Optimizer:
    """SGD as in every training, or AdamW; biases and norms do not decay."""
    if kind == "sgd":
        return optimisers.make(module, recipe)
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=recipe.lr)


def pack(module: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's tensors by name: momenta, and AdamW's counts and second moments."""
    return {
        f"state/{name}/{key}": value
        for name, parameter in module.named_parameters()
        for key, value in optimiser.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def unpack(
    tensors: Mapping[str, Tensor], module: nn.Module, optimiser: torch.optim.Optimizer
) -> None:
    """Puts the optimiser's tensors back in place."""
    for name, parameter in module.named_parameters():
        start = f"state/{name}/"
        for key, value in tensors.items():
            if key.startswith(start):
                # laid out in memory as the parameter is, so that the same kernels run
                like = value.shape == parameter.shape and value.ndim > 0
                place = torch.empty_like(parameter) if like else torch.empty_like(value)
                optimiser.state[parameter][key.removeprefix(start)] = place.copy_(value)


def held(module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Weights of sparse layers, each with a tensor of ones where it may move and zeros elsewhere."""
    found = []
    for layer in module.modules():
        weight = getattr(layer, "weight", None)
        if isinstance(layer, nn.Linear | nn.modules.conv._ConvNd) and isinstance(weight, Tensor):
            share = float((weight == 0).float().mean())
            if _SPARSE <= share < 1:
                found.append((weight, (weight != 0).to(weight.dtype)))
    return found
