"""Attention with fewer heads as a graph of torch's own: what leaves is plain.

`compress.attention.Attention` stands for a cut `nn.MultiheadAttention` while a network is cut. Here it
becomes a `torch.fx.GraphModule` that does what the network asks of it: the masks it is given, weights
or none, batch first or second. Where its calls differ, it serves each.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from espalier.compress.attention import Attention
from espalier.compress.calls import Call
from espalier.errors import EspalierError
from espalier.export.placing import put

_INPUTS = ("query", "key", "value")
_MASKS = ("attn_mask", "key_padding_mask")
_OTHERS = ("key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal")
# torch's encoder layers look at these
_READ = ("batch_first", "num_heads", "head_dim", "in_proj_bias", "_qkv_same_embed_dim")


def plain_attention(network: nn.Module, calls: Mapping[str, Call]) -> None:
    """Turn every cut attention of a network into a graph, as it is called in `calls`, in place."""
    for path, module in list(network.named_modules()):
        if isinstance(module, Attention) and path in calls:
            put(network, path, as_graph(module, calls[path]))


@dataclass
class Calls(Call):
    """Calls of one attention that differ, as one: `kwargs` are an example of all that is given."""


def attended(calls: Sequence[Call]) -> dict[str, Call]:
    """Each attention that is called (its path), and how: where its calls differ, all in one.

    Errors: `EspalierError` where some of an attention's inputs are batches and some are not.
    """
    found: dict[str, list[Call]] = {}
    for call in calls:
        if isinstance(call.module, nn.MultiheadAttention):
            found.setdefault(call.path, []).append(call)
    return {path: _merged(some) for path, some in found.items()}


def _merged(calls: Sequence[Call]) -> Call:
    last, given = calls[-1], [_given(call) for call in calls]
    if len({_form(call) for call in calls}) == 1:
        return last
    if len({g["query"].dim() for g in given}) > 1:
        raise EspalierError(f"{last.path} is called with batches and without: it can't be cut")
    shapes = {"attn_mask": (1, 1, 1, 1), "key_padding_mask": (1,) * (given[-1]["query"].dim() - 1)}
    every = {
        name: torch.zeros(shape) if any(g.get(name) is not None for g in given) else None
        for name, shape in shapes.items()
    }
    weights = any(g.get("need_weights", True) for g in given)
    each = {"need_weights": weights, "average_attn_weights": False}
    return Calls(last.path, last.module, last.parent, kwargs=given[-1] | every | each)


def _given(call: Call) -> dict[str, Any]:
    return dict(zip(_INPUTS + _OTHERS, call.args, strict=False)) | dict(call.kwargs)


def _form(call: Call) -> tuple[object, ...]:
    """What a graph for one call has fixed: its masks' kinds and places, and what it gives."""
    given = _given(call)
    masks = [
        (name, name in call.kwargs, mask.dim(), mask.is_floating_point())
        for name in _MASKS
        if (mask := given.get(name)) is not None
    ]
    wanted = bool(given.get("need_weights", True)), bool(given.get("average_attn_weights", True))
    return (given["query"].dim(), *masks, *wanted)


def as_graph(module: Attention, call: Call) -> fx.GraphModule:
    """The attention as it is called: with the same masks, and weights or none."""
    given = _given(call)
    body = _Body(module, given)
    graph = fx.Graph()
    ends: dict[str, Any] = {name: graph.placeholder(name) for name in _INPUTS}
    several = isinstance(call, Calls)
    ends |= _any_of(graph, given, ends["query"], module) if several else _these(graph, call, given)
    with warnings.catch_warnings(action="ignore"):
        for name in _READ:  # a graph module keeps, and copies, what its graph reads
            graph.get_attr(name)
    inner = fx.Tracer().trace(body)
    made: dict[fx.Node, Any] = {}
    for node in inner.nodes:
        if node.op == "placeholder":
            made[node] = ends[node.target]
        elif node.op == "output":
            found: Any = fx.map_arg(node.args[0], lambda n: made[n])
            graph.output(_wanted(graph, found, ends) if several else found)
        else:
            made[node] = graph.node_copy(node, lambda n: made[n])
    for node in graph.nodes:
        node.meta.clear()
    return fx.GraphModule(body, graph, "MultiheadAttention").train(module.training)


def _these(graph: fx.Graph, call: Call, given: Mapping[str, Any]) -> dict[str, Any]:
    """The masks where one call gives them."""
    ends: dict[str, Any] = {}
    args, kwargs = graph.placeholder("*args"), graph.placeholder("**kwargs")
    for name in _MASKS:
        if given.get(name) is None:
            ends[name] = None
        elif name in call.kwargs:
            ends[name] = graph.call_function(operator.getitem, (kwargs, name))
        else:
            ends[name] = graph.call_function(operator.getitem, (args, _OTHERS.index(name)))
    return ends


def _any_of(
    graph: fx.Graph, given: Mapping[str, Any], like: fx.Node, module: Attention
) -> dict[str, Any]:
    """Everything that a call may give: masks of any kind, or none, as what is added."""
    ends: dict[str, Any] = {
        name: graph.placeholder(name, default_value=None if name in _MASKS else True)
        for name in _OTHERS
    }
    for name in _MASKS:
        if given[name] is None:
            ends[name] = None
            continue
        shape = (1,) * min(given[name].dim(), 2)
        nothing = graph.call_method("new_zeros", (like, shape))
        missing = graph.call_function(operator.is_, (ends[name], None))
        mask = _either(graph, missing, nothing, ends[name])
        if name == "attn_mask":  # (n, m), or (b * heads, n, m)
            one = graph.call_function(operator.eq, (graph.call_method("dim", (mask,)), 2))
            sizes = _either(graph, one, (1, 1, -1), (-1, module.num_heads))
            mask = graph.call_method("unflatten", (mask, 0, sizes))
        kind = graph.call_function(getattr, (mask, "dtype"))
        hides = graph.call_function(operator.eq, (kind, torch.bool))
        zeros = graph.call_function(torch.zeros_like, (mask,), {"dtype": torch.float32})
        hidden = graph.call_method(
            "masked_fill", (zeros, graph.call_method("bool", (mask,)), float("-inf"))
        )
        ends[name] = _either(graph, hides, hidden, mask)
    return ends


def _wanted(graph: fx.Graph, found: Any, ends: Mapping[str, Any]) -> Any:
    """What a call gives: with weights, of each head or their mean, or without."""
    out, weights = found
    if weights is None:
        return found
    mean = graph.call_method("mean", (weights, -3))
    weights = _either(graph, ends["average_attn_weights"], mean, weights)
    return out, _either(graph, ends["need_weights"], weights, None)


def _either(graph: fx.Graph, condition: fx.Node, yes: Any, no: Any) -> fx.Node:
    """One of two, by a truth that is no tensor: a graph has no branches."""
    return graph.call_function(operator.getitem, ((no, yes), condition))


class _Body(nn.Module):
    """The attention without choices, to be traced; holds its weights under their names."""

    def __init__(self, module: Attention, given: Mapping[str, Any]) -> None:
        super().__init__()
        for name, parameter in module._parameters.items():
            self.register_parameter(name, parameter)
        self.register_parameter("in_proj_bias", module.in_proj_bias)  # type: ignore[arg-type]
        self.out_proj = module.out_proj
        self.num_heads, self.head_dim = module.num_heads, module.head_dim
        self.batch_first, self._qkv_same_embed_dim = module.batch_first, False
        self.attn_drop = nn.Dropout(module.dropout)
        self._weights = bool(given.get("need_weights", True))
        self._average = bool(given.get("average_attn_weights", True))
        self._batched = given["query"].dim() == 3
        self._swaps = self._batched and not module.batch_first
        self._mask, self._padding = given.get("attn_mask"), given.get("key_padding_mask")

    def forward(
        self, query: Any, key: Any, value: Any, attn_mask: Any, key_padding_mask: Any
    ) -> tuple[Any, Any]:
        if not self._batched:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
        elif self._swaps:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        q, k, v = (self._projected(i, t) for i, t in enumerate((query, key, value)))
        scores = q @ k.transpose(-2, -1) / self.head_dim**0.5
        if self._mask is not None:
            scores = scores + self._own(attn_mask, self._mask)
        if self._padding is not None:
            padding = self._summed(key_padding_mask, self._padding)
            padding = padding if self._padding.dim() == 2 else padding.unsqueeze(0)
            scores = scores + padding.unsqueeze(1).unsqueeze(1)
        weights = self.attn_drop(F.softmax(scores, -1))
        out = self.out_proj((weights @ v).transpose(1, 2).flatten(2))
        if not self._batched:
            out = out.squeeze(0)
        elif self._swaps:
            out = out.transpose(0, 1)
        if not self._weights:
            return out, None
        weights = weights.mean(1) if self._average else weights
        return out, weights if self._batched else weights.squeeze(0)

    def _own(self, mask: Any, example: Tensor) -> Any:
        mask = self._summed(mask, example)
        return mask.unflatten(0, (-1, self.num_heads)) if example.dim() == 3 else mask

    def _summed(self, mask: Any, example: Tensor) -> Any:
        """The mask as what is added: minus infinity where it says True."""
        if example.is_floating_point():
            return mask
        return mask.float().masked_fill(mask, float("-inf"))

    def _projected(self, index: int, x: Any) -> Any:
        if self._parameters.get("in_proj_weight") is not None:
            weight: Any = self.in_proj_weight.chunk(3)[index]  # type: ignore[operator]
        else:
            weight = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)[index]
        held = self._parameters.get("in_proj_bias") is not None
        bias = self.in_proj_bias.chunk(3)[index] if held else None  # type: ignore[operator]
        made: Any = F.linear(x, weight, bias)
        return made.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
