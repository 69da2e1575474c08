"""Chains of bottleneck blocks, plain or depthwise, as analytic design chooses them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from espalier.nets.family import Family
from espalier.nets.plain import traced
from espalier.space import Candidate, Constraint, Linear, Option, Space, ordinal

Options = Sequence[int]


@dataclass(frozen=True)
class Layout:
    """What is not decided: the strides of the groups of blocks and of the stem, and the kind.

    `depthwise` blocks have a squeeze and excitation and a shortcut where widths are equal; plain
    ones are projected where a group begins. `head` is the width of a last 1x1 convolution; 0: none.
    """

    strides: tuple[int, ...] = (2, 2, 2, 1, 2)
    stem_stride: int = 2
    depthwise: bool = False
    head: int = 0

    @property
    def groups(self) -> tuple[str, ...]:
        """The names of the groups: group1, group2, ..."""
        return tuple(f"group{n}" for n in range(1, len(self.strides) + 1))


class Bottleneck(nn.Module):
    """Narrow, filter, widen, and a shortcut: `(b, in, h, w) -> (b, out, h/stride, w/stride)`."""

    def __init__(
        self,
        inputs: int,
        inner: int,
        outputs: int,
        kernel: int,
        stride: int,
        depthwise: bool,
        first: bool,
    ) -> None:
        super().__init__()
        act = nn.SiLU if depthwise else nn.ReLU
        filtering = _conv(inner, inner, kernel, stride, inner if depthwise else 1)
        self.body = nn.Sequential(
            *_conv(inputs, inner),
            act(),
            *filtering,
            act(),
            *([SqueezeExcite(inner)] if depthwise else []),
            *_conv(inner, outputs),
        )
        pool: list[nn.Module] = [nn.AvgPool2d(2, ceil_mode=True)] if stride == 2 else []
        self.shortcut: nn.Module | None = nn.Sequential(*pool)
        if depthwise and inputs != outputs:
            self.shortcut = None
        elif not depthwise and first:
            self.shortcut = nn.Sequential(*pool, *_conv(inputs, outputs))
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        if self.shortcut is not None:
            out = out + self.shortcut(x)
        result: Tensor = self.act(out)
        return result


class SqueezeExcite(nn.Module):
    """Weighs channels by what they hold on average (Hu et al., 2018), a quarter as wide inside."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(1, round(channels * 0.25) // 8) * 8
        self.weigh = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            *_conv(channels, inner),
            nn.SiLU(),
            *_conv(inner, channels),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x * self.weigh(x)
        return out


class Bottlenecks(Family):
    """Networks of a stem, groups of bottleneck blocks and a classifier, for images `(c, h, w)`.

    Decisions: `stem`, and for each group `groupN.out` (channels between blocks), `groupN.inner`
    (channels inside), `groupN.kernel` (odd), `groupN.depth` (blocks). A group is at most 4 times
    as wide as what goes in. Plain blocks are narrower inside than outside, at most 10 times;
    depthwise ones 1.5 to 6 times wider, and groups of them do not get narrower.
    The networks of DeepMAD (Shen et al., CVPR 2023).
    """

    name = "bottlenecks"

    def __init__(
        self,
        shape: Sequence[int],
        classes: int,
        layout: Layout | None = None,
        *,
        stem: Options = (8, 16, 24, 32),
        out: Options | Sequence[Options] = tuple(range(16, 129, 16)),
        inner: Options | Sequence[Options] = tuple(range(8, 65, 8)),
        kernel: Options = (3, 5),
        depth: Options | Sequence[Options] = (1, 2, 3, 4),
    ) -> None:
        self.shape, self.classes = tuple(shape), classes
        self.layout = layout or Layout()
        count = len(self.layout.strides)
        outs, inners, depths = (_each(options, count) for options in (out, inner, depth))
        decisions = [ordinal("stem", *stem)]
        for name, *options in zip(self.layout.groups, outs, inners, depths, strict=True):
            decisions.append(ordinal(f"{name}.out", *options[0]))
            decisions.append(ordinal(f"{name}.inner", *options[1]))
            decisions.append(ordinal(f"{name}.kernel", *kernel))
            decisions.append(ordinal(f"{name}.depth", *options[2]))
        self._space = Space(decisions, _rules(self.layout))

    @property
    def space(self) -> Space:
        """The decisions."""
        return self._space

    def build(self, candidate: Candidate) -> nn.Module:
        """A plain network with fresh random weights."""
        return network(candidate, self.layout, self.shape[0], self.classes)


def network(choices: Any, layout: Layout, channels: int, classes: int) -> nn.Module:
    """The network of options `groupN.out`, ..., which may be of any space."""
    width = _whole(choices["stem"])
    stem = nn.Sequential(*_conv(channels, width, 3, layout.stem_stride), nn.ReLU())
    parts: list[tuple[str, nn.Module]] = [("stem", stem)]
    for name, stride in zip(layout.groups, layout.strides, strict=True):
        out, inner, kernel, depth = (
            _whole(choices[f"{name}.{part}"]) for part in ("out", "inner", "kernel", "depth")
        )
        blocks = []
        for i in range(depth):
            step = stride if i == 0 else 1
            blocks.append(Bottleneck(width, inner, out, kernel, step, layout.depthwise, i == 0))
            width = out
        parts.append((name, nn.Sequential(*blocks)))
    if layout.head:
        parts.append(("head", nn.Sequential(*_conv(width, layout.head), nn.SiLU())))
        width = layout.head
    parts += [("pool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten())]
    parts.append(("linear", nn.Linear(width, classes)))
    found = nn.Sequential(OrderedDict(parts))
    with torch.no_grad():
        for module in found.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return traced(found, "Bottlenecks")  # torch's classes only


def _conv(
    inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1
) -> tuple[nn.Module, nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return conv, nn.BatchNorm2d(outputs)


def _rules(layout: Layout) -> list[Constraint]:
    rules: list[Constraint] = []
    before = "stem"
    for name in layout.groups:
        out, inner = f"{name}.out", f"{name}.inner"
        rules.append(Linear({before: 4.0, out: -1.0}, ">=", 0.0))
        if layout.depthwise:
            rules.append(Linear({out: 1.0, before: -1.0}, ">=", 0.0))
            rules.append(Linear({inner: 1.0, out: -1.5}, ">=", 0.0))
            rules.append(Linear({inner: 1.0, out: -6.0}, "<=", 0.0))
        else:
            rules.append(Linear({inner: 1.0, out: -1.0}, "<=", 0.0))
            rules.append(Linear({inner: 10.0, out: -1.0}, ">=", 0.0))
        before = out
    return rules


def _each(options: Options | Sequence[Options], count: int) -> list[Options]:
    first: Any = options[0]
    return list(options) if isinstance(first, Sequence) else [options] * count  # type: ignore[arg-type, list-item]


def _whole(option: Option) -> int:
    return int(option)
