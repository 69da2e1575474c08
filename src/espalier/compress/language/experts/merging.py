"""Fewer experts as mixtures of those there are: two matrices a layer, no training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from espalier.compress.language.anatomy import Experts, anatomy
from espalier.compress.language.shape.following import follow
from espalier.errors import EspalierError

STACKS = ("gate_up_proj", "down_proj")


@torch.no_grad()
def merge_experts(model: nn.Module, layer: int, mix: Tensor, router: Tensor) -> None:
    """Layer `layer`, in place: new expert i has the weights `sum_j mix[i, j] * expert j`, in all
    three maps, and the router's logit `sum_j router[i, j] * logit j`.

    Both matrices are `(new, old)`; one-hot rows prune, a square permutation reorders. A token gets
    no more experts than there are. Source: Liu et al., Efficient Expert Pruning for Sparse
    Mixture-of-Experts Language Models, 2024 (https://arxiv.org/abs/2407.00945).
    Errors: `EspalierError` for shapes that do not fit, or a layer without experts.
    """
    at = mixture(model, layer)
    for name, matrix in (("mix", mix), ("router", router)):
        if matrix.dim() != 2 or matrix.shape[1] != at.count or not len(matrix):
            raise EspalierError(
                f"{name} is (new experts, {at.count}) for layer {layer}, got {tuple(matrix.shape)}"
            )
    if len(mix) != len(router):
        raise EspalierError(f"mix makes {len(mix)} experts, router knows {len(router)}")
    experts: Any = model.get_submodule(f"{at.path}.experts")
    gate: Any = model.get_submodule(at.router)
    for name in STACKS:
        setattr(experts, name, _mixed(getattr(experts, name), mix))
    gate.weight = _mixed(gate.weight, router)
    for module in (experts, gate):
        module.num_experts = len(mix)
    active = min(at.active, len(mix))
    for path in (at.router, at.path):
        owner: Any = model.get_submodule(path)
        if hasattr(owner, "top_k"):
            owner.top_k = active
    follow(model)


def _mixed(weight: Any, matrix: Tensor) -> nn.Parameter:
    made = torch.einsum("ij,j...->i...", matrix.to(weight), weight)
    return nn.Parameter(made, requires_grad=weight.requires_grad)


def mixture(model: nn.Module, layer: int) -> Experts:
    """The experts of a layer. Errors: `EspalierError` where it has none."""
    layers = anatomy(model).layers
    if not 0 <= layer < len(layers):
        raise EspalierError(f"layers are 0 to {len(layers) - 1}, got {layer}")
    feed = layers[layer].feed
    if not isinstance(feed, Experts):
        raise EspalierError(f"layer {layer} has no mixture of experts")
    return feed


def chosen(experts: Tensor, count: int) -> Tensor:
    """The matrix `(kept, count)` that keeps some experts as they are."""
    return torch.nn.functional.one_hot(experts.long(), count).double()


def absorbed(kept: Tensor, alike: Tensor, weight: Tensor) -> Tensor:
    """The matrix `(kept, count)` in which every other expert goes into the kept one most alike.

    `alike (count, count)`: larger is more alike; `weight (count,)`: each expert's say in the mean,
    such as how often it is used.
    """
    count = len(alike)
    into = alike[:, kept].argmax(1)
    into[kept] = torch.arange(len(kept))
    mix = torch.zeros(len(kept), count, dtype=torch.double)
    mix[into, torch.arange(count)] = weight.double().clamp_min(1e-9)
    return mix / mix.sum(1, keepdim=True)
