"""Groups of a Llama's weights that can leave together: how salient they are, and leaving them out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from espalier.compress.language.anatomy import Anatomy, Feed, Weights, anatomy
from espalier.compress.language.shape.hidden import norms
from espalier.compress.language.shape.surgery import keep_heads, keep_hidden, keep_units

Group = tuple[str, int]  # ("heads" | "units" | "hidden", layer); hidden channels are of layer -1
Kept = dict[Group, Tensor]
_LEAST = {"heads": 1, "units": 8, "hidden": 16}  # that stay


def saliency(model: Any) -> dict[Group, Tensor]:
    """|sum of weight times gradient| of each group, with gradients there (LLM-Pruner's, of first
    order): what the loss would change, were the group not there."""
    parts = anatomy(model)
    found: dict[Group, Tensor] = {}
    products = {name: p.detach() * p.grad for name, p in model.named_parameters()}

    def of(weights: Weights) -> Tensor:
        product: Tensor = products[f"{weights.path}.weight"]
        return product

    hidden = products[f"{parts.embedding}.weight"].sum(0)
    for path, _ in norms(model, parts):
        hidden = hidden + products[f"{path}.weight"]
    for i, layer in enumerate(parts.layers):
        a, f = layer.attention, layer.feed
        assert a is not None
        assert isinstance(f, Feed)
        own = [of(w).sum(1).reshape(a.groups, -1).sum(1) for w in (a.query, a.key, a.value)]
        found["heads", i] = sum(own, of(a.out).sum(0).reshape(a.groups, -1).sum(1)).abs()
        ups = [f.up] if f.gate is None else [f.gate, f.up]
        found["units", i] = sum((of(w).sum(1) for w in ups), of(f.down).sum(0)).abs()
        hidden = hidden + sum(of(w).sum(0) for w in (a.query, a.key, a.value, *ups))
        hidden = hidden + of(a.out).sum(1) + of(f.down).sum(1)
    found["hidden", -1] = hidden.abs()
    return found


def counted(parts: Anatomy, sizes: Mapping[Group, int]) -> int:
    """Weights of a model with so many groups of each kind in each layer (a Llama with one table)."""
    hidden = sizes["hidden", -1]
    total = parts.vocabulary * hidden + hidden
    for i, layer in enumerate(parts.layers):
        a = layer.attention
        assert a is not None
        each = 2 * (a.heads // a.groups + 1) * a.head * hidden
        total += sizes["heads", i] * each + 3 * hidden * sizes["units", i] + 2 * hidden
    return total


def chosen(parts: Anatomy, found: Mapping[Group, Tensor], size: float) -> Kept:
    """What stays: groups leave by saliency a weight, least first, until the model is small enough."""
    sizes = {group: len(values) for group, values in found.items()}
    now = counted(parts, sizes)
    each = {g: now - counted(parts, {**sizes, g: n - 1}) for g, n in sizes.items()}
    rows = [
        (float(value) / each[group], group, i)
        for group, values in found.items()
        for i, value in enumerate(values)
    ]
    gone: dict[Group, list[int]] = {group: [] for group in found}
    for _, group, i in sorted(rows):
        if counted(parts, sizes) <= size:
            break
        if sizes[group] > _LEAST[group[0]]:
            sizes[group] -= 1
            gone[group].append(i)
    return {
        group: torch.tensor([i for i in range(len(values)) if i not in set(gone[group])])
        for group, values in found.items()
    }


def cut(model: Any, kept: Kept, scaled: bool) -> None:
    """Takes all other groups out; norms' scales follow the width only where `scaled`."""
    for (kind, layer), stay in kept.items():
        if kind == "heads":
            keep_heads(model, layer, stay)
        elif kind == "units":
            keep_units(model, layer, stay)
    ones = None if scaled else {path: 1.0 for path, _ in norms(model, anatomy(model))}
    keep_hidden(model, kept["hidden", -1], ones)


def weights(model: nn.Module) -> int:
    """Weights, shared ones once."""
    return sum(p.numel() for p in model.parameters())


def operations(model: nn.Module, tokens: int) -> float:
    """Floating-point operations of a step: 6 a weight and token (Kaplan et al., 2020)."""
    return 6.0 * weights(model) * tokens
