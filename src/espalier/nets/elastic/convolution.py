"""Convolutions whose channels and kernels are decisions.

Smaller sizes are slices of the largest: the first channels, and the centre of a kernel
(Cai et al., Once-for-All, 2020). Slices are views, taken anew in each pass so that gradients
reach the shared weights; the largest size is the weights themselves. With `transform=True` a
smaller kernel is the centre of the next larger one times a learned matrix, as in that paper: 25x25
from 7 to 5, 9x9 from 5 to 3, shared by all channels of the layer, the identity at first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espalier.errors import SpaceError
from espalier.nets.elastic.core import Elastic, Maker, filled, initialise
from espalier.nets.elastic.dims import Choices, Dim, decisions, ends, options, size, text
from espalier.nets.elastic.masks import Spread, refuse_per_sample, spread
from espalier.nets.elastic.mixing import Weights, no_gates, resolve
from espalier.nets.elastic.slices import Cut, cut
from espalier.space import Decision


@dataclass(frozen=True)
class _Mixture:
    """The three sizes of a convolution under a mixture."""

    inputs: Spread
    outputs: Spread
    side: Spread


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
        transform: bool,
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
        self._steps = _steps(kernel) if transform else ()
        for step in self._steps:
            self.register_parameter(f"to_{step}", nn.Parameter(torch.empty(step**2, step**2)))
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
        for step in self._steps:
            nn.init.eye_(self.get_parameter(f"to_{step}"))

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
        self.__dict__["_settled"] = choices
        if self._mixed is not None:
            self._mixed = None
        self._set(*self._sizes(choices))

    def mix(self, weights: Mapping[str, Weights]) -> None:
        found = resolve(weights, self.decisions())
        no_gates(found.values(), found)
        dims = (self.in_channels, self.out_channels, self.kernel)
        made = _Mixture(*(spread(dim, found, self._choices()) for dim in dims))
        refuse_per_sample(made.side, "a kernel", [d.name for d in decisions(self.kernel)])
        self._mixed = made

    def _set(self, inputs: int, outputs: int, side: int) -> None:
        self._inputs, self._outputs, self._side = inputs, outputs, side
        self._pad = side // 2 if self.padding is None else self.padding
        self._groups = inputs if self.depthwise else 1
        self._cut = self._window(inputs, outputs, side)

    def _window(self, inputs: int, outputs: int, side: int) -> Cut:
        full = tuple(self.weight.shape)
        side = full[-1] if self._steps else side  # transforms take the whole kernel
        window = cut(full, (outputs, 1 if self.depthwise else inputs, side, side))
        if side == full[-1] or window is None:
            return window
        start = (full[-1] - side) // 2
        centre = slice(start, start + side)
        return (*window[:2], centre, centre)

    def _refuse(self, x: Tensor, inputs: int) -> None:
        raise SpaceError(
            f"a convolution declared for {inputs} channels ({text(self.in_channels)})"
            f" got {x.shape[1]}: declare the channels that the layer before it gives"
        )

    def _transformed(self, weight: Tensor, side: int) -> Tensor:
        """The kernels of size `side` that the transforms make of the largest ones."""
        for step in self._steps:
            if step < side:
                break
            border = (weight.shape[-1] - step) // 2
            centre = weight[..., border : border + step, border : border + step]
            matrix = self.get_parameter(f"to_{step}")
            weight = F.linear(centre.flatten(-2), matrix).reshape(centre.shape)
        return weight

    def _blended(self, weight: Tensor, side: Spread) -> Tensor:
        """The sum over kernels of weight times kernel, each in the centre of the largest."""
        total: Tensor | None = None
        parts = (None,) if side.sure else side.weights().to(weight.dtype)
        for own, part in zip(side.sizes, parts, strict=True):
            border = (side.size - own) // 2
            kernel = F.pad(self._transformed(weight, own), (border,) * 4)
            kernel = kernel if part is None else part * kernel
            total = kernel if total is None else total + kernel
        assert total is not None
        return total

    def _mixture(self, x: Tensor, mixed: _Mixture) -> Tensor:
        inputs, outputs, side = mixed.inputs.size, mixed.outputs.size, mixed.side.size
        if x.shape[1] != inputs:
            self._refuse(x, inputs)
        window = self._window(inputs, outputs, side)
        weight = self.weight if window is None else self.weight[window]
        if self._steps:
            weight = self._blended(weight, mixed.side)
        elif not mixed.side.sure:
            weight = weight * mixed.side.taps().to(weight.dtype)
        bias = None if self.bias is None else self.bias[:outputs]
        padding = side // 2 if self.padding is None else self.padding
        groups = inputs if self.depthwise else 1
        return mixed.outputs.masked(F.conv2d(x, weight, bias, self.stride, padding, 1, groups), 1)

    def forward(self, x: Tensor) -> Tensor:
        if self._mixed is not None:
            return self._mixture(x, self._mixed)
        if x.shape[1] != self._inputs:
            self._refuse(x, self._inputs)
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if self._cut is not None:
            weight, bias = weight[self._cut], None if bias is None else bias[: self._outputs]
        if self._steps:
            weight = self._transformed(weight, self._side)
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
        window = self._window(inputs, outputs, side)
        weight = self.weight if window is None else self.weight[window]
        weight = self._transformed(weight, side)
        tensors: dict[str, Tensor] = {"weight": weight}
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


def _steps(kernel: Dim) -> tuple[int, ...]:
    """The kernel sizes that a transform makes, the largest first."""
    if isinstance(kernel, int):
        return ()
    if not isinstance(kernel, Decision):
        raise SpaceError(
            f"transforms need a kernel that is one decision, got {text(kernel)}: leave transform out"
        )
    return tuple(sorted((int(option) for option in options(kernel)), reverse=True)[1:])


class Conv2d(_Convolution):
    """A convolution `(b, in, h, w) -> (b, out, h/stride, w/stride)`, square kernel.

    `in_channels`, `out_channels` and `kernel` are sizes: an int, a decision or a product.
    Padding is `kernel // 2`, unless given for a fixed kernel. `transform`: smaller kernels are
    learned transforms of the larger ones.
    """

    def __init__(
        self,
        in_channels: Dim,
        out_channels: Dim,
        kernel: Dim = 3,
        stride: int = 1,
        padding: int | None = None,
        bias: bool = True,
        transform: bool = False,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel, stride, padding, bias, False, transform)


class DepthwiseConv2d(_Convolution):
    """A convolution of each channel on its own `(b, c, h, w) -> (b, c, h/stride, w/stride)`.

    `transform`: smaller kernels are learned transforms of the larger ones.
    """

    def __init__(
        self,
        channels: Dim,
        kernel: Dim = 3,
        stride: int = 1,
        padding: int | None = None,
        bias: bool = True,
        transform: bool = False,
    ) -> None:
        super().__init__(channels, channels, kernel, stride, padding, bias, True, transform)
