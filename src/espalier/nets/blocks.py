"""Pieces that several families share, and how deep a network an input of some size wants."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from torch import nn

from espalier.errors import SpaceError
from espalier.nets.elastic import BatchNorm2d, Conv2d, DepthwiseConv2d, Dim
from espalier.space import Decision, ordinal

Options = Sequence[int | float]


def conv_norm(
    inputs: Dim,
    outputs: Dim,
    kernel: Dim = 1,
    stride: int = 1,
    relu: bool = True,
    depthwise: bool = False,
    transform: bool = False,
) -> nn.Sequential:
    """Convolution, batch normalisation and, unless told otherwise, ReLU."""
    conv = (
        DepthwiseConv2d(inputs, kernel, stride, bias=False, transform=transform)
        if depthwise
        else Conv2d(inputs, outputs, kernel, stride, bias=False, transform=transform)
    )
    layers: list[tuple[str, nn.Module]] = [("conv", conv), ("norm", BatchNorm2d(outputs))]
    if relu:
        layers.append(("relu", nn.ReLU()))
    return nn.Sequential(OrderedDict(layers))


def knob(name: str, options: Options | float) -> Decision | int | float:
    """An ordinal decision over the options, or the number itself where there is but one."""
    found = (options,) if isinstance(options, (int, float)) else tuple(options)
    if not found:
        raise SpaceError(f"{name} needs at least one option, got none")
    wrong = [o for o in found if isinstance(o, bool) or not isinstance(o, (int, float)) or o <= 0]
    if wrong:
        raise SpaceError(f"{name} takes positive numbers, got {wrong[0]!r}")
    ordered = sorted(set(found))
    return ordered[0] if len(ordered) == 1 else ordinal(name, *ordered)


def whole(name: str, options: Options | int) -> Decision | int:
    """A knob over whole numbers: a width, a depth, a kernel or a resolution."""
    made = knob(name, options)
    found = made.options if isinstance(made, Decision) else (made,)
    for option in found:
        if not isinstance(option, int):
            raise SpaceError(f"{name} takes whole numbers, got {option!r}")
    return made if isinstance(made, Decision) else int(made)


def halvings(shape: Sequence[int]) -> int:
    """How often the image is halved on its way: to about 4 pixels a side, at least twice."""
    return max(2, min(5, round(math.log2(max(1, min(shape[1:])) / 4))))


def strides(shape: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """The stride of the stem and of each stage. Small images keep their size in the stem."""
    total = halvings(shape)
    stem = 2 if total > 2 else 1
    halved = total - (stem == 2)
    return stem, (1,) + (2,) * halved


def resolutions(shape: Sequence[int]) -> tuple[int, ...]:
    """Heights worth trying: the native one, three quarters and, of larger images, half of it."""
    height = shape[1]
    shares = (1.0,) if height < 16 else (0.75, 1.0) if height < 24 else (0.5, 0.75, 1.0)
    sizes = {height if share == 1 else max(4, round(height * share / 4) * 4) for share in shares}
    return tuple(sorted(sizes))


def per_stage(
    name: str, given: Iterable[Options | int] | None, default: Sequence[Options], stages: int
) -> list[Options | int]:
    """One set of options a stage: as given, else the defaults for that many stages."""
    found: list[Options | int] = list(default if given is None else given)
    if len(found) != stages:
        raise SpaceError(
            f"{name} needs options for each of the {stages} stages, got {len(found)}: write"
            f" {name}=[(16, 32), ...]"
        )
    return found
