"""Batch norm and average pooling that are as fast as they should be, differentiated twice too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class Quick(TorchFunctionMode):
    """Within this context, with the same numbers up to rounding: 3x3 average pooling at stride 1 is
    a depthwise box filter, and batch norms in training mode have a short second derivative.

    Norms' weights and biases get no gradient, and running statistics are left alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self._shares: dict[tuple[int, int, bool], Tensor] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is functional.avg_pool2d:
            pooled = _read_pool(*args, **(kwargs or {}))
            if pooled is not None:
                return _Box.apply(pooled[0], self._share(*pooled))  # type: ignore[no-untyped-call]
        if func is functional.batch_norm:
            normed = _read_norm(*args, **(kwargs or {}))
            if normed is not None:
                return _Norm.apply(*normed)  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))

    def _share(self, x: Tensor, counted: bool) -> Tensor:
        """One over the number of pixels under each box."""
        height, width = x.shape[2:]
        key = height, width, counted
        if key not in self._shares:
            rows, columns = x.new_full((height,), 3.0), x.new_full((width,), 3.0)
            for line in () if counted else (rows, columns):
                line[0] -= 1
                line[-1] -= 1
            self._shares[key] = 1 / (rows[:, None] * columns)
        return self._shares[key]


def _read_pool(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> tuple[Tensor, bool] | None:
    """Input and whether padding counts, where it is the pooling that this is for."""
    same = kernel_size in (3, (3, 3)) and stride in (1, (1, 1)) and padding in (1, (1, 1))
    plain = not ceil_mode and divisor_override is None and input.ndim == 4
    if not same or not plain or min(input.shape[2:]) < 2 or input.dtype != torch.float32:
        return None
    return input, count_include_pad


def _read_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor | None, Tensor | None, float] | None:
    """Input, weight, bias and epsilon, where the statistics are those of the batch."""
    few = input.numel() // input.shape[1] < 2  # torch refuses: so it shall
    if not training or few or input.dtype != torch.float32:
        return None
    return input, weight, bias, eps


class _Box(torch.autograd.Function):
    """The mean over 3x3 boxes; `share` is one over the pixels of each. Linear, so its second
    derivative is that of the box filter that takes gradients back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: Tensor) -> Tensor:
        ctx.share = share
        return _box(x) * share

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Turned.apply(gradient, ctx.share), None  # type: ignore[no-untyped-call]


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, share: Tensor) -> Tensor:
        ctx.share = share
        return _box(gradient * share)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Box.apply(gradient, ctx.share), None  # type: ignore[no-untyped-call]


def _box(x: Tensor) -> Tensor:
    channels = x.shape[1]
    return functional.conv2d(x, x.new_ones(channels, 1, 3, 3), padding=1, groups=channels)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        out, mean, inverse = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight, mean, inverse = ctx.saved_tensors
        return (
            _NormBack.apply(gradient, x, weight, mean, inverse, ctx.eps),  # type: ignore[no-untyped-call]
            None,
            None,
            None,
        )


class _NormBack(torch.autograd.Function):
    """The gradient of a batch norm, and the gradient of that.

    With n = (x - mean) * inverse and m values a channel, the gradient is
    inverse * (h - mean(h) - n * mean(n h)) of h = weight * gradient: a symmetric map of h, so going
    back through it is the same map. Its change with x is
    -(inverse / m) * ((n.v) out + (n.h) map(v) + (v.out) n).
    """

    @staticmethod
    def forward(
        ctx: Any,
        gradient: Tensor,
        x: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        inverse: Tensor,
        eps: float,
    ) -> Tensor:
        out, along = _back(gradient, x, weight, mean, inverse, eps)
        ctx.save_for_backward(x, weight, mean, inverse, out, along)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse, out, along = ctx.saved_tensors
        mapped, turned = _back(v, x, None, mean, inverse, ctx.eps)
        m = x.numel() // x.shape[1]
        scale = -inverse / m
        if weight is not None:
            along = along * weight
        dims = [d for d in range(x.ndim) if d != 1]
        both = (v * out).sum(dims) * inverse * scale
        wide = (1, -1, *[1] * (x.ndim - 2))
        moved = x * both.view(wide)
        moved += (-mean * both).view(wide)
        moved = torch.addcmul(moved, out, (turned * scale).view(wide))
        moved = torch.addcmul(moved, mapped, (along * scale).view(wide))
        back = mapped if weight is None else mapped * weight.view(wide)
        return back, moved, None, None, None, None


def _back(
    gradient: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, inverse: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradient to the input, and the sum of gradient times normalised input a channel."""
    out, along, _ = torch.ops.aten.native_batch_norm_backward(
        gradient, x, weight, None, None, mean, inverse, True, eps, [True, True, False]
    )
    return out, along
