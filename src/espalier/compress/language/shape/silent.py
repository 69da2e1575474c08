"""Sub-layers that add nothing, made of torch's own modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from espalier.compress.language.anatomy import Anatomy, Layer

# a norm that only feeds a sub-layer, or only follows it, goes with it
_NORMS: dict[str, tuple[str, ...]] = {
    "attention": ("input_layernorm", "ln_1", "layernorm_before"),
    "feed": ("post_attention_layernorm", "ln_2", "layernorm_after"),
}
_GEMMA2: dict[str, tuple[str, ...]] = {
    "attention": ("input_layernorm", "post_attention_layernorm"),
    "feed": ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
}
_OPT: dict[str, tuple[str, ...]] = {
    "attention": ("self_attn_layer_norm",),
    "feed": ("final_layer_norm",),
}


def silence(model: nn.Module, parts: Anatomy, layer: Layer, part: str) -> None:
    """Replace a sub-layer by one that gives zeros. Where norms follow the residual sums (BERT, old
    OPT) they stay: they are the hidden states' own."""
    block = model.get_submodule(layer.path)
    if part == "attention" and parts.kind == "bert":
        model.set_submodule(f"{layer.path}.attention.self", _zeros(2))
        model.set_submodule(f"{layer.path}.attention.output.dense", nn.Identity())
    elif part == "attention":
        assert layer.attention is not None
        model.set_submodule(layer.attention.path, _zeros(2))
    elif parts.kind == "bert":
        model.set_submodule(f"{layer.path}.intermediate", nn.Identity())
        model.set_submodule(f"{layer.path}.output.dense", _zeros())
    elif parts.kind == "opt":
        model.set_submodule(f"{layer.path}.fc1", nn.Identity())
        model.set_submodule(f"{layer.path}.fc2", _zeros())
    else:
        assert layer.feed is not None
        model.set_submodule(layer.feed.path, _zeros())
    for name in _norms(parts.kind, block)[part]:
        if name in block._modules:
            block._modules[name] = nn.Identity()


def hollow(model: nn.Module, parts: Anatomy, layer: Layer) -> None:
    """Silence both sub-layers and norms of a block: it hands on its input, and holds nothing."""
    for part, there in (("attention", layer.attention), ("feed", layer.feed)):
        if there is not None:
            silence(model, parts, layer, part)
    for path, module in list(model.get_submodule(layer.path).named_modules()):
        if path and next(module.parameters(recurse=False), None) is not None:
            model.set_submodule(f"{layer.path}.{path}", nn.Identity())


def _norms(kind: str, block: Any) -> dict[str, tuple[str, ...]]:
    if kind == "gemma2":
        return _GEMMA2
    if kind == "opt":
        return _OPT if block.do_layer_norm_before else {"attention": (), "feed": ()}
    return _NORMS


def _zeros(outputs: int = 0) -> nn.Module:
    """Gives zeros of its first input's shape, whatever else it is given; with `outputs` they are
    the first of so many results, the others None."""
    graph = fx.Graph()
    x = graph.placeholder("hidden_states")
    graph.placeholder("*args")
    graph.placeholder("**kwargs")
    zeros: Any = graph.call_function(torch.zeros_like, (x,))
    graph.output((zeros, *[None] * (outputs - 1)) if outputs else zeros)
    return fx.GraphModule(nn.Module(), graph).eval()
