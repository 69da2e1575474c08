"""Attention with fewer heads as a graph of torch's own: what leaves is plain.

`compress.attention.Attention` stands for a cut `nn.MultiheadAttention` while a network is cut. Here it
becomes a `torch.fx.GraphModule` that does what the network asks of it: the masks it is given, weights
or none, batch first or second.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn
from torch.nn import functional as F

from espalier.compress.attention import Attention
from espalier.compress.calls import Call
from espalier.export.placing import put

_INPUTS = ("query", "key", "value")
_OTHERS = ("key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal")
# torch's encoder layers look at these
_READ = ("batch_first", "num_heads", "head_dim", "in_proj_bias", "_qkv_same_embed_dim")


def plain_attention(network: nn.Module, calls: Mapping[str, Call]) -> None:
    """Turn every cut attention of a network into a graph, as it is called in `calls`, in place."""
    for path, module in list(network.named_modules()):
        if isinstance(module, Attention) and path in calls:
            put(network, path, as_graph(module, calls[path]))


def as_graph(module: Attention, call: Call) -> fx.GraphModule:
    """The attention as it is called: with the same masks, and weights or none."""
    given = dict(zip(_INPUTS + _OTHERS, call.args, strict=False)) | dict(call.kwargs)
    body = _Body(module, given)
    graph = fx.Graph()
    ends = {name: graph.placeholder(name) for name in _INPUTS}
    args, kwargs = graph.placeholder("*args"), graph.placeholder("**kwargs")
    for name in ("attn_mask", "key_padding_mask"):
        if given.get(name) is None:
            ends[name] = None  # type: ignore[assignment]
        elif name in call.kwargs:
            ends[name] = graph.call_function(operator.getitem, (kwargs, name))
        else:
            ends[name] = graph.call_function(operator.getitem, (args, _OTHERS.index(name)))
    with warnings.catch_warnings(action="ignore"):
        for name in _READ:  # a graph module keeps, and copies, what its graph reads
            graph.get_attr(name)
    inner = fx.Tracer().trace(body)
    made: dict[fx.Node, Any] = {}
    for node in inner.nodes:
        if node.op == "placeholder":
            made[node] = ends[node.target]
        elif node.op == "output":
            graph.output(fx.map_arg(node.args[0], lambda n: made[n]))
        else:
            made[node] = graph.node_copy(node, lambda n: made[n])
    for node in graph.nodes:
        node.meta.clear()
    return fx.GraphModule(body, graph, "MultiheadAttention").train(module.training)


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
