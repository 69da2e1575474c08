"""What must follow a change of shapes: a model's configuration and the places in its cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from espalier.compress.language.anatomy import Anatomy, anatomy


def follow(model: nn.Module) -> Anatomy:
    """Bring what a running model reads up to date with its modules: the number of layers, the
    width, each layer's kind of attention and its place in the cache. (What a folder's configuration
    must say of shapes is found when one is written.)"""
    parts = anatomy(model)
    config: Any = model.config
    config.num_hidden_layers = len(parts.layers)
    config.hidden_size = parts.width
    places(model, parts)
    return parts


def places(model: nn.Module, parts: Anatomy) -> None:
    """Attentions take the first places in the cache, so that its first layer tells the length.

    Where a model mixes kinds of attention (full, sliding), a cache's layer has the kind that
    `config.layer_types` says at its place, and so has the mask at a layer's own place: an
    attention beyond the first m keeps its kind by taking the place of one that was dropped.
    """
    config: Any = model.config
    kept = [i for i, layer in enumerate(parts.layers) if layer.attention is not None]
    kinds = getattr(config, "layer_types", None)
    if kinds is None or len(set(kinds)) < 2:
        order = {i: place for place, i in enumerate(kept)}
        if kinds is not None:
            config.layer_types = [kinds[0]] * len(parts.layers)
    else:
        holes = iter(sorted(set(range(len(kept))) - set(kept)))
        order = {i: i if i < len(kept) else next(holes) for i in kept}
        own = {place: kinds[i] for i, place in order.items()} | {i: kinds[i] for i in kept}
        config.layer_types = [own.get(i, own.get(0, kinds[0])) for i in range(len(parts.layers))]
    for i, place in order.items():
        attention = parts.layers[i].attention
        assert attention is not None
        owner: Any = model.get_submodule(attention.query.path.rpartition(".")[0])
        if not hasattr(owner, "layer_idx"):
            continue
        if getattr(owner, "scale_attn_by_inverse_layer_idx", False) and owner.layer_idx != place:
            # GPT-2 can divide scores by the place: what the place no longer says, the weights do
            with torch.no_grad():
                attention.query.read(model).mul_((place + 1) / (owner.layer_idx + 1))
                bias = attention.query.bias(model)
                if bias is not None:
                    bias.mul_((place + 1) / (owner.layer_idx + 1))
            owner.scaling *= (owner.layer_idx + 1) / (place + 1)
        owner.layer_idx = place
