"""Depthwise convolutions in bf16 whose gradients take as long as they should.

Measured on x86 with oneDNN (torch 2.13), one thread, 48 channels at 16x16, batch 128, bf16: the
weight gradient of a 3x3 kernel takes 0.3 ms, of 5x5 over 20, of 7x7 over 40, since only kernels up
to 3 have a fast path; the input gradient takes 0.4 ms, with stride 2 over 40. So large kernels are
treated as overlapping tiles of 3x3, and strided input gradients are computed in fp32 (1 ms). The
numbers are the same up to rounding. In fp32 torch's own gradients are as fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_TILE = 3


class FastDepthwise(TorchFunctionMode):
    """Within this context, depthwise `conv2d` calls that are to be differentiated go fast."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is functional.conv2d and not kwargs and len(args) == 7 and torch.is_grad_enabled():
            x, weight, bias, stride, padding, dilation, groups = args
            stride, padding = _one(stride), _one(padding)
            if _is_slow(x, weight, stride, padding, dilation, groups):
                if torch.is_autocast_enabled("cpu"):
                    dtype = torch.get_autocast_dtype("cpu")
                    x, weight = x.to(dtype), weight.to(dtype)
                out: Tensor = _Depthwise.apply(x, weight, stride, padding)  # type: ignore[no-untyped-call]
                return out if bias is None else out + bias.to(out.dtype)[:, None, None]
        return func(*args, **(kwargs or {}))


def _one(value: Any) -> int | None:
    """The value of a pair of equal numbers, or of a number; None for anything else."""
    if isinstance(value, int):
        return value
    if isinstance(value, tuple) and len(set(value)) == 1:
        return int(value[0])
    return None


def _is_slow(
    x: Tensor, weight: Tensor, stride: int | None, padding: int | None, dilation: Any, groups: int
) -> bool:
    side = weight.shape[-1]
    return (
        groups == weight.shape[0] == x.shape[1] > 1
        and weight.shape[2] == side
        and side % 2 == 1
        and _one(dilation) == 1
        and padding is not None
        and stride is not None
        and (side > _TILE or stride > 1)
    )


class _Depthwise(torch.autograd.Function):
    """A depthwise convolution without bias; see the module for what its gradients avoid."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return functional.conv2d(x, weight, None, stride, padding, 1, len(weight))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        grad, stride, padding = grads[0], ctx.stride, ctx.padding
        to_x = to_weight = None
        if ctx.needs_input_grad[0]:
            to_x = _input_gradient(grad, x, weight, stride, padding)
        if ctx.needs_input_grad[1]:
            to_weight = _weight_gradient(grad, x, weight, stride, padding)
        return to_x, to_weight, None, None


def _input_gradient(grad: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    if stride > 1 and grad.dtype != torch.float32:
        # only the shape of x is read, so no copy of it is made
        like = torch.empty_like(x, dtype=torch.float32)
        out = _backward(grad.float(), like, weight.float(), stride, padding, first=True)
        return out.to(x.dtype)
    return _backward(grad, x, weight, stride, padding, first=True)


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    side = weight.shape[-1]
    if side <= _TILE:
        return _backward(grad, x, weight, stride, padding, first=False)
    padded = functional.pad(x, (padding,) * 4)
    rows = stride * (grad.shape[2] - 1) + _TILE
    columns = stride * (grad.shape[3] - 1) + _TILE
    tile = weight.new_empty((len(weight), 1, _TILE, _TILE))
    out = torch.empty_like(weight)
    for top in range(0, side - _TILE + 1, _TILE - 1):  # tiles overlap by one row and column
        for left in range(0, side - _TILE + 1, _TILE - 1):
            part = padded[:, :, top : top + rows, left : left + columns]
            part = part.contiguous(memory_format=torch.channels_last)
            got = _backward(grad, part, tile, stride, 0, first=False)
            out[:, :, top : top + _TILE, left : left + _TILE] = got
    return out


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, first: bool
) -> Tensor:
    """The gradient of a depthwise convolution for its input (`first`) or its weight."""
    both = torch.ops.aten.convolution_backward(
        grad,
        x,
        weight,
        None,
        [stride, stride],
        [padding, padding],
        [1, 1],
        False,
        [0, 0],
        len(weight),
        [first, not first, False],
    )
    found: Tensor = both[0 if first else 1]
    return found
