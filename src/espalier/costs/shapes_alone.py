"""Operators on tensors without values: what they make has a shape, and that is all.

torch finds most of these shapes by a decomposition in Python, which takes longer than computing on a
small tensor would. For the operators that fill networks the shape is plain.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten


def called(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What an operator makes of its arguments."""
    short = _SHORT.get(func)
    if short is not None and isinstance(args[0], Tensor) and args[0].is_meta:
        found = short(*args, **kwargs)
        if found is not None:
            return found
    return func(*args, **kwargs)


class AsOnProcessor(TorchFunctionMode):
    """Inside, attention of tensors without values is the operator that it is on a processor, which
    elsewhere falls into others."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention and args and args[0].is_meta:
            return _attention(*args, **given)
        return func(*args, **given)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    attend = aten._scaled_dot_product_flash_attention_for_cpu
    found: Tensor = attend(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
    return found


def _alike(x: Tensor, *settings: Any, **more: Any) -> Tensor:
    return torch.empty_like(x)


def _both(x: Tensor, y: Any, **settings: Any) -> Tensor | None:
    same = isinstance(y, Tensor) and y.is_meta and (y.shape, y.dtype) == (x.shape, x.dtype)
    return torch.empty_like(x) if same else None


def _batch_norm(x: Tensor, *given: Any) -> tuple[Tensor, ...] | None:
    training = given[4]
    # without training it keeps nothing of the batch
    return None if training else (torch.empty_like(x), x.new_empty(0), x.new_empty(0))


def _layer_norm(x: Tensor, over: list[int], *given: Any) -> tuple[Tensor, ...]:
    kept = (*x.shape[: x.dim() - len(over)], *[1] * len(over))
    laid_out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return laid_out, x.new_empty(kept), x.new_empty(kept)


def _group_norm(x: Tensor, *given: Any) -> tuple[Tensor, ...]:
    kept = (given[2], given[5])
    return torch.empty_like(x), x.new_empty(kept), x.new_empty(kept)


def _plus_product(bias: Tensor, x: Tensor, y: Tensor, **settings: Any) -> Tensor:
    return x.new_empty(x.shape[0], y.shape[1])


_SHORT: dict[Any, Callable[..., Any]] = {
    aten.native_batch_norm.default: _batch_norm,
    aten.native_layer_norm.default: _layer_norm,
    aten.native_group_norm.default: _group_norm,
    aten.addmm.default: _plus_product,
    aten.add.Tensor: _both,
    aten.mul.Tensor: _both,
    aten.relu.default: _alike,
    aten.gelu.default: _alike,
    aten.silu.default: _alike,
    aten.sigmoid.default: _alike,
    aten.tanh.default: _alike,
    aten.hardswish.default: _alike,
    aten.hardsigmoid.default: _alike,
    aten.hardtanh.default: _alike,
    aten.leaky_relu.default: _alike,
}
