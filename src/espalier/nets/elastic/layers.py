"""Convolutions, linear layers and norms whose sizes are decisions.

Smaller sizes are slices of the largest: the first channels, and the centre of a kernel
(Cai et al., Once-for-All, 2020). Slices are views, taken anew in each pass so that gradients
reach the shared weights; the largest size is the weights themselves.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espalier.errors import SpaceError
from espalier.nets.elastic.core import Elastic, Maker, filled, initialise
from espalier.nets.elastic.dims import Choices, Dim, decisions, ends, options, size, text
from espalier.space import Decision

Cut = tuple[slice, ...] | None


def _cut(full: tuple[int, ...], part: tuple[int, ...]) -> Cut:
    """What to index with to get `part` of `full`; None for all of it."""
    if full == part:
        return None
    cut = [slice(None) if n == m else slice(m) for n, m in zip(full, part, strict=True)]
    while cut[-1] == slice(None):
        cut.pop()
    return tuple(cut)


class _Convolution(Elastic):
    """A square convolution with slices: what plain and depthwise ones share."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: Dim,
        out_channels: Dim,
        kernel: Dim,
        stride: int,
        padding: int | None,
        bias: bool,
        depthwise: bool,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.kernel = in_channels, out_channels, kernel
        self.stride, self.padding, self.depthwise = stride, padding, depthwise
        self._most = tuple(
            ends(dim, what)[1]
            for dim, what in (
                (in_channels, "number of channels"),
                (out_channels, "number of channels"),
                (kernel, "kernel"),
            )
        )
        _check_kernel(kernel, padding)
        inputs, outputs, side = self._most
        shape = (outputs, 1 if depthwise else inputs, side, side)
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        self.reset_parameters()
        self._set(*self._most)

    def reset_parameters(self) -> None:
        """Fresh weights."""
        inputs, outputs, side = self._most
        groups = inputs if self.depthwise else 1
        layer = nn.Conv2d(inputs, outputs, side, groups=groups, bias=False, device="meta")
        layer.weight = self.weight
        initialise(layer)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def decisions(self) -> tuple[Decision, ...]:
        dims = (self.in_channels, self.out_channels, self.kernel)
        return tuple(dict.fromkeys(d for dim in dims for d in decisions(dim)))

    def _sizes(self, choices: Choices) -> tuple[int, int, int]:
        return (
            size(self.in_channels, choices),
            size(self.out_channels, choices),
            size(self.kernel, choices),
        )

    def settle(self, choices: Choices) -> None:
        self._set(*self._sizes(choices))

    def _set(self, inputs: int, outputs: int, side: int) -> None:
        self._inputs, self._outputs, self._side = inputs, outputs, side
        self._pad = side // 2 if self.padding is None else self.padding
        self._groups = inputs if self.depthwise else 1
        self._cut = self._window(inputs, outputs, side)

    def _window(self, inputs: int, outputs: int, side: int) -> Cut:
        full = tuple(self.weight.shape)
        cut = _cut(full, (outputs, 1 if self.depthwise else inputs, side, side))
        if side == full[-1] or cut is None:
            return cut
        start = (full[-1] - side) // 2
        centre = slice(start, start + side)
        return (*cut[:2], centre, centre)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != self._inputs:
            raise SpaceError(
                f"a convolution declared for {self._inputs} channels ({text(self.in_channels)})"
                f" got {x.shape[1]}: declare the channels that the layer before it gives"
            )
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if self._cut is not None:
            weight, bias = weight[self._cut], None if bias is None else bias[: self._outputs]
        return F.conv2d(x, weight, bias, self.stride, self._pad, 1, self._groups)

    def plain(self, make: Maker) -> nn.Module:
        inputs, outputs, side = self._sizes(make.choices)
        layer = nn.Conv2d(
            inputs,
            outputs,
            side,
            stride=self.stride,
            padding=side // 2 if self.padding is None else self.padding,
            groups=inputs if self.depthwise else 1,
            bias=self.bias is not None,
            device="meta",
        )
        cut = self._window(inputs, outputs, side)
        tensors: dict[str, Tensor] = {"weight": self.weight if cut is None else self.weight[cut]}
        if self.bias is not None:
            tensors["bias"] = self.bias[:outputs]
        return filled(layer, make, tensors, self)

    def extra_repr(self) -> str:
        kind = "depthwise, " if self.depthwise else ""
        return (
            f"{kind}{text(self.in_channels)} -> {text(self.out_channels)},"
            f" kernel={text(self.kernel)}, stride={self.stride}"
        )


def _check_kernel(kernel: Dim, padding: int | None) -> None:
    found = [options(d) for d in decisions(kernel)]
    if not found:
        return
    if padding is not None:
        raise SpaceError(
            f"a kernel that is a decision ({text(kernel)}) sets its own padding: leave padding out"
        )
    even = [o for group in found for o in group if not isinstance(o, str) and o % 2 == 0]
    if even:
        raise SpaceError(
            f"the options of a kernel must be odd, {text(kernel)} has {even[0]}: an even one"
            " changes the size of the output"
        )


class Conv2d(_Convolution):
    """A convolution `(b, in, h, w) -> (b, out, h/stride, w/stride)`, square kernel.

    `in_channels`, `out_channels` and `kernel` are sizes: an int, a decision or a product.
    Padding is `kernel // 2`, unless given for a fixed kernel.
    """

    def __init__(
        self,
        in_channels: Dim,
        out_channels: Dim,
        kernel: Dim = 3,
        stride: int = 1,
        padding: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel, stride, padding, bias, False)


class DepthwiseConv2d(_Convolution):
    """A convolution of each channel on its own `(b, c, h, w) -> (b, c, h/stride, w/stride)`."""

    def __init__(
        self,
        channels: Dim,
        kernel: Dim = 3,
        stride: int = 1,
        padding: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__(channels, channels, kernel, stride, padding, bias, True)


class Linear(Elastic):
    """A linear layer `(..., in) -> (..., out)`; both are sizes."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, in_features: Dim, out_features: Dim, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        inputs = ends(in_features, "number of features")[1]
        outputs = ends(out_features, "number of features")[1]
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        self.reset_parameters()
        self._set(inputs, outputs)

    def reset_parameters(self) -> None:
        """Fresh weights, as torch's own layer has them."""
        outputs, inputs = self.weight.shape
        layer = nn.Linear(inputs, outputs, bias=self.bias is not None, device="meta")
        layer.weight = self.weight
        layer.register_parameter("bias", self.bias)
        initialise(layer)

    def decisions(self) -> tuple[Decision, ...]:
        return tuple(dict.fromkeys(decisions(self.in_features) + decisions(self.out_features)))

    def settle(self, choices: Choices) -> None:
        self._set(size(self.in_features, choices), size(self.out_features, choices))

    def _set(self, inputs: int, outputs: int) -> None:
        self._inputs, self._outputs = inputs, outputs
        self._cut = _cut(tuple(self.weight.shape), (outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self._inputs:
            raise SpaceError(
                f"a linear layer declared for {self._inputs} features ({text(self.in_features)})"
                f" got {x.shape[-1]}: declare the features that the layer before it gives"
            )
        if self._cut is None:
            return F.linear(x, self.weight, self.bias)
        bias = None if self.bias is None else self.bias[: self._outputs]
        return F.linear(x, self.weight[self._cut], bias)

    def plain(self, make: Maker) -> nn.Module:
        inputs = size(self.in_features, make.choices)
        outputs = size(self.out_features, make.choices)
        layer = nn.Linear(inputs, outputs, bias=self.bias is not None, device="meta")
        tensors = {"weight": self.weight[:outputs, :inputs]}
        if self.bias is not None:
            tensors["bias"] = self.bias[:outputs]
        return filled(layer, make, tensors, self)

    def extra_repr(self) -> str:
        return f"{text(self.in_features)} -> {text(self.out_features)}"


class BatchNorm2d(Elastic, nn.BatchNorm2d):
    """Batch normalisation of `(b, c, h, w)`; smaller widths share the first channels' statistics.

    The statistics of a candidate are therefore right only after they have been set for it:
    see `train.recalibrate`.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, channels: Dim, eps: float = 1e-5, momentum: float | None = 0.1) -> None:
        self._width = ends(channels, "number of channels")[1]
        super().__init__(self._width, eps=eps, momentum=momentum)
        self.channels = channels

    def decisions(self) -> tuple[Decision, ...]:
        return decisions(self.channels)

    def settle(self, choices: Choices) -> None:
        self._width = size(self.channels, choices)

    def forward(self, x: Tensor) -> Tensor:
        n = self._width
        if x.shape[1] != n:
            raise SpaceError(
                f"a batch norm declared for {n} channels ({text(self.channels)}) got"
                f" {x.shape[1]}: declare the channels that the layer before it gives"
            )
        if n == self.num_features:
            return super().forward(x)
        rate = self.momentum
        if self.training:
            self.num_batches_tracked.add_(1)
        if rate is None:  # torch's convention: the statistics are a plain average
            rate = 1.0 / float(self.num_batches_tracked) if self.training else 0.0
        return F.batch_norm(
            x,
            self.running_mean[:n],
            self.running_var[:n],
            self.weight[:n],
            self.bias[:n],
            self.training,
            rate,
            self.eps,
        )

    def plain(self, make: Maker) -> nn.Module:
        n = size(self.channels, make.choices)
        layer = nn.BatchNorm2d(n, eps=self.eps, momentum=self.momentum, device="meta")
        tensors = {
            "weight": self.weight[:n],
            "bias": self.bias[:n],
            "running_mean": self.running_mean[:n],
            "running_var": self.running_var[:n],
            "num_batches_tracked": self.num_batches_tracked,
        }
        return filled(layer, make, tensors, self)

    def extra_repr(self) -> str:
        return text(self.channels)


class LayerNorm(Elastic, nn.LayerNorm):
    """Layer normalisation over the last dimension of `(..., n)`."""

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, features: Dim, eps: float = 1e-5) -> None:
        self._width = ends(features, "number of features")[1]
        super().__init__(self._width, eps=eps)
        self.features = features

    def decisions(self) -> tuple[Decision, ...]:
        return decisions(self.features)

    def settle(self, choices: Choices) -> None:
        self._width = size(self.features, choices)

    def forward(self, x: Tensor) -> Tensor:
        n = self._width
        return F.layer_norm(x, (n,), self.weight[:n], self.bias[:n], self.eps)

    def plain(self, make: Maker) -> nn.Module:
        n = size(self.features, make.choices)
        layer = nn.LayerNorm(n, eps=self.eps, device="meta")
        return filled(layer, make, {"weight": self.weight[:n], "bias": self.bias[:n]}, self)

    def extra_repr(self) -> str:
        return text(self.features)
