"""The operators and nodes of the DARTS space, for `DARTSCells`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.nets.elastic.containers import OneOf
from espalier.nets.elastic.core import Elastic, Maker, When
from espalier.nets.elastic.dims import Choices, options
from espalier.nets.elastic.mixing import Mixed, Weights, along, no_gates, resolve
from espalier.nets.fan import pooled
from espalier.space import Decision

OPERATORS = (
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)


class Pool(Elastic):
    """3x3 averages of what is inside the image, without `AvgPool2d`'s slowness."""

    def decisions(self) -> tuple[Decision, ...]:
        return ()

    def forward(self, x: Tensor) -> Tensor:
        return pooled(x)

    def plain(self, make: Maker) -> nn.Module:
        return nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)


class HalfStep(nn.Module):
    """Half the size without losing a pixel: two strided 1x1 convolutions, one a pixel further."""

    def __init__(self, inputs: int, outputs: int, affine: bool) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.even = nn.Conv2d(inputs, outputs // 2, 1, stride=2, bias=False)
        self.odd = nn.Conv2d(inputs, outputs - outputs // 2, 1, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(outputs, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(x)
        further = F.pad(x, (0, 1, 0, 1))[:, :, 1:, 1:]
        out: Tensor = self.norm(torch.cat([self.even(x), self.odd(further)], 1))
        return out


def point(inputs: int, outputs: int, affine: bool) -> nn.Sequential:
    """Relu, 1x1 convolution, norm."""
    conv = nn.Conv2d(inputs, outputs, 1, bias=False)
    return nn.Sequential(nn.ReLU(), conv, nn.BatchNorm2d(outputs, affine=affine))


def _separable(
    channels: int, kernel: int, stride: int, dilation: int, affine: bool
) -> list[nn.Module]:
    """Relu, depthwise and 1x1 convolution, norm."""
    padding = dilation * (kernel // 2)
    depthwise = nn.Conv2d(
        channels, channels, kernel, stride, padding, dilation, groups=channels, bias=False
    )
    return [nn.ReLU(), depthwise, *list(point(channels, channels, affine))[1:]]


def operator(name: str, channels: int, stride: int, affine: bool) -> nn.Module:
    if name == "skip_connect":
        return nn.Identity() if stride == 1 else HalfStep(channels, channels, affine)
    if name.endswith("pool_3x3"):
        pool: nn.Module = Pool()
        if name.startswith("max"):
            pool = nn.MaxPool2d(3, stride, padding=1)
        elif stride > 1:
            pool = nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)
        return nn.Sequential(pool, nn.BatchNorm2d(channels, affine=False))
    kernel = int(name[-1])
    if name.startswith("dil"):
        return nn.Sequential(*_separable(channels, kernel, stride, 2, affine))
    first = _separable(channels, kernel, stride, 1, affine)
    return nn.Sequential(*first, *_separable(channels, kernel, 1, 1, affine))


class PartialEdge(nn.Module):
    """An edge that changes one part in `partial` of the channels.

    The others pass times the sum of the edge's weights, through a max pool where the stride is 2;
    a channel shuffle follows.
    """

    def __init__(self, inner: OneOf, partial: int, stride: int) -> None:
        super().__init__()
        self.inner, self.partial = inner, partial
        self.rest = nn.Identity() if stride == 1 else nn.MaxPool2d(2, 2, ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        part = x.shape[1] // self.partial
        first = x[:, :part].contiguous(memory_format=torch.channels_last)
        rest, mixed = self.rest(x[:, part:]), self.inner._mixed
        if mixed is not None and not mixed.sure:
            rest = rest * along(mixed.weights.sum(-1), rest)
        return F.channel_shuffle(torch.cat([self.inner(first), rest], 1), self.partial)


class Node(Elastic):
    """The sum of the edges from two of the states; `states` is a list of tensors.

    A mixture weighs pairs, and an edge has the sum of the weights of the pairs that it is in.
    """

    def __init__(self, inputs: Decision | None, edges: Sequence[nn.Module]) -> None:
        super().__init__()
        self.inputs = inputs
        self.pairs = list(combinations(range(len(edges)), 2))
        for index, edge in enumerate(edges):
            self.add_module(str(index), edge)
        self._pair = self.pairs[-1]

    def decisions(self) -> tuple[Decision, ...]:
        return () if self.inputs is None else (self.inputs,)

    def branches(self) -> Iterator[tuple[nn.Module, When]]:
        for index, edge in enumerate(self.children()):
            if self.inputs is None:
                yield edge, {}
            else:
                names = tuple(pair_name(pair) for pair in self.pairs if index in pair)
                yield edge, {self.inputs.name: names}

    def _chosen(self, choices: Choices) -> tuple[int, int]:
        if self.inputs is None:
            return self.pairs[0]
        return self.pairs[options(self.inputs).index(choices[self.inputs.name])]

    def settle(self, choices: Choices) -> None:
        self._pair, self._mixed = self._chosen(choices), None

    def mix(self, weights: Mapping[str, Weights]) -> None:
        found = resolve(weights, self.decisions())
        no_gates(found.values(), found)
        for mixed in found.values():
            self._mixed = mixed

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        if self._mixed is not None:
            return self._mixture(states, self._mixed)
        one, other = self._pair
        out: Tensor = self._edge(one, states) + self._edge(other, states)
        return out

    def _edge(self, index: int, states: Sequence[Tensor]) -> Tensor:
        out: Tensor = self.get_submodule(str(index))(states[index])
        return out

    def _mixture(self, states: Sequence[Tensor], mixed: Mixed) -> Tensor:
        live = sorted({index for i in mixed.live for index in self.pairs[i]})
        total: Tensor | None = None
        for index in live:
            out = self._edge(index, states)
            if not mixed.sure:
                within = [i for i, pair in enumerate(self.pairs) if index in pair]
                out = out * along(mixed.weights[..., within].sum(-1), out)
            total = out if total is None else total + out
        assert total is not None
        return total

    def plain(self, make: Maker) -> nn.Module:
        pair = self._chosen(make.choices)
        edges = {index: make(self.get_submodule(str(index))) for index in pair}
        return _Pair(pair, edges)


class _Pair(nn.Module):
    """What is left of a node in a plain network; tracing takes the class away."""

    def __init__(self, pair: tuple[int, int], edges: Mapping[int, nn.Module]) -> None:
        super().__init__()
        self._pair = pair
        for index, edge in edges.items():
            self.add_module(str(index), edge)

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        one, other = self._pair
        out: Tensor = (
            self._modules[str(one)](states[one])  # type: ignore[misc]
            + self._modules[str(other)](states[other])  # type: ignore[misc]
        )
        return out


def pair_name(pair: tuple[int, int]) -> str:
    return f"{pair[0]}-{pair[1]}"
