"""DeepMAD's design for limits of one's own: what `espalier.recipes.deepmad.design` is."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from espalier.errors import BudgetError, EspalierError
from espalier.nets.bottlenecks import Layout, network
from espalier.recipes._parts.deepmad import entropy as deepmad
from espalier.recipes._parts.deepmad.entropy import Wanted
from espalier.recipes._parts.deepmad.near import eight
from espalier.recipes._parts.deepmad.polish import fits


@dataclass(frozen=True)
class Design:
    """A designed network: its widths, kernels and depths, its score, what it takes.

    `choices` has `stem` (channels), and for each group of blocks `groupN.out` (channels between
    blocks), `groupN.inner` (channels inside), `groupN.kernel` (pixels) and `groupN.depth` (blocks).
    `macs` and `params` are what `espalier.costs.count` gives for `build()`, `effectiveness` is the
    largest of all stages, `seconds` how long the design took.
    """

    shape: tuple[int, int, int]
    classes: int
    layout: Layout
    choices: dict[str, int]
    score: float
    macs: int
    params: int
    effectiveness: float
    seconds: float

    def build(self) -> nn.Module:
        """The network of torch's own layers, with fresh random weights: images to logits."""
        return network(self.choices, self.layout, self.shape[0], self.classes)


def design(
    shape: Sequence[int],
    classes: int,
    *,
    macs: float,
    params: float,
    effectiveness: float | None = 0.3,
    layout: Layout | None = None,
    kernels: Sequence[int] | None = None,
    seconds: float = 50,
    seed: int = 0,
) -> Design:
    """The network of most score within limits of your own, without data and without training.

    The analytic design of DeepMAD (Shen et al., DeepMAD: Mathematical Architecture Design for Deep
    Convolutional Neural Network, CVPR 2023): entropy of the stages, weighed 1, ..., 1, 8, less 10
    exp(standard deviation of depths), as programs of allocation, one around the design before.

    Args:
        shape: channels, height and width of the images; square, in pixels.
        classes: outputs of the classifier.
        macs: multiply-accumulates of one image at most: convolutions and classifier.
        params: weights at most, those of norms and of the classifier among them.
        effectiveness: depth over width of every stage at most, in layers a channel of the geometric
            mean of fan-ins; the paper takes 0.3, and 0.5 for depthwise blocks. None: no limit, which
            gives networks too deep to be trained.
        layout: strides and kind of blocks; left out, the paper's, with a stride of 32 in all.
        kernels: sizes to choose from, in pixels; left out, the paper's (3 and 5; depthwise also 7).
        seconds: time at most, 2 more for the last steps. More time may find a better design.
        seed: of the solver. Equal seeds give equal designs where time does not cut the solver short.

    Errors: `BudgetError` where a limit can't be kept, or no design that keeps all is found;
    `EspalierError` where something else makes no sense; `MissingExtra` without OR-Tools.
    """
    from espalier.recipes._parts.deepmad.program import design as solved

    begin = time.perf_counter()
    wanted = _wanted(shape, classes, macs, params, effectiveness, layout or Layout(), kernels)
    if not seconds > 0:
        raise EspalierError(f"seconds must be more than 0, got {seconds:g}")
    _reachable(wanted)
    start = _start(wanted)
    try:
        found = solved(wanted, seconds=seconds, seed=seed, start=start)
    except BudgetError:
        near = deepmad.measured(wanted, start)
        raise BudgetError(
            f"no design within {_told(macs, params, effectiveness)} was found, near is one of "
            f"{_told(near['flops'], near['params'], near['effectiveness'])}: raise a limit, give a "
            "layout of fewer groups, or more seconds"
        ) from None
    numbers = found.numbers
    return Design(
        shape=(wanted.channels, wanted.resolution, wanted.resolution),
        classes=classes,
        layout=wanted.layout,
        choices=found.choices,
        score=numbers["score"],
        macs=round(numbers["flops"]),
        params=round(numbers["params"]),
        effectiveness=numbers["effectiveness"],
        seconds=time.perf_counter() - begin,
    )


def _told(macs: float, params: float, effectiveness: float | None) -> str:
    told = f"{macs:,.0f} macs, {params:,.0f} params"
    return told if effectiveness is None else f"{told}, effectiveness {effectiveness:.3g}"


def _wanted(
    shape: Sequence[int],
    classes: int,
    macs: float,
    params: float,
    effectiveness: float | None,
    layout: Layout,
    kernels: Sequence[int] | None,
) -> Wanted:
    """The limits in the words of the programs; what makes no sense is refused."""
    limits = {"macs": macs, "params": params}
    if effectiveness is not None:
        limits["effectiveness"] = effectiveness
    for name, value in limits.items():
        if not 0 < value < math.inf:
            raise BudgetError(f"{name} must be a positive number, got {value}")
    if len(shape) != 3 or shape[1] != shape[2] or min(shape) < 1:
        raise EspalierError(f"shape must be channels, side, side, got {tuple(shape)}")
    if classes < 1:
        raise EspalierError(f"classes must be 1 or more, got {classes}")
    if not layout.strides or not {layout.stem_stride, *layout.strides} <= {1, 2}:
        raise EspalierError(f"strides of the layout must be 1 or 2, got {layout}")
    whole = math.prod((layout.stem_stride, *layout.strides))
    if shape[1] % whole:
        raise EspalierError(
            f"the side of images, {shape[1]}, must be a multiple of the layout's strides, {whole}: "
            "resize them, or give a layout with fewer strides of 2"
        )
    plain = not layout.depthwise
    kernels = tuple(kernels or ((3, 5) if plain else (3, 5, 7)))
    if any(k < 1 or k > 99 or k % 2 == 0 for k in kernels):
        raise EspalierError(f"kernels must be odd, from 1 to 99, got {kernels}")
    return Wanted(
        layout,
        shape[1],
        macs,
        params,
        effectiveness,
        weights=(*[1.0] * layout.strides.count(2), 8.0),
        # the last three groups of plain blocks are to be even in depth, as the authors count them
        uneven=max(0, len(layout.strides) - 3) if plain else 0,
        kernels=kernels,
        stems=(8, 16, 24, 32) if plain else (16, 24, 32, 40),
        widest=2048 if plain else 1280,
        channels=shape[0],
        classes=classes,
    )


def _design(wanted: Wanted, stem: int, widths: Sequence[int], depth: int) -> dict[str, int]:
    found = {"stem": stem}
    for name, width in zip(wanted.layout.groups, widths, strict=True):
        inner = width * 4 if wanted.layout.depthwise else eight(width / 4)
        parts = {"out": width, "inner": inner, "kernel": min(wanted.kernels), "depth": depth}
        found |= {f"{name}.{part}": value for part, value in parts.items()}
    return found


def _reachable(wanted: Wanted) -> None:
    """Refuses limits below what the smallest network of all takes. Errors: `BudgetError`."""
    stem = min(wanted.stems)
    width = stem if wanted.layout.depthwise else 8
    least = _design(wanted, stem, [width] * len(wanted.layout.groups), 1)
    for name in wanted.layout.groups:
        least[f"{name}.inner"] = eight(1.5 * width) if wanted.layout.depthwise else 8
    numbers = deepmad.measured(wanted, least)
    for name, key, most in (("macs", "flops", wanted.flops), ("params", "params", wanted.params)):
        if numbers[key] > most:
            raise BudgetError(
                f"{most:g} {name} can't be kept: the smallest network of this layout takes "
                f"{numbers[key]:,.0f}"
            )


def _starts(wanted: Wanted) -> Iterator[dict[str, int]]:
    """Designs that get wider from group to group, of many sizes."""
    for stem in wanted.stems:
        for first in (1, 2, 4):
            for growth in (1.0, 1.5, 2.0):
                width, widths = float(stem * first), []
                for _ in wanted.layout.groups:
                    widths.append(min(eight(width), wanted.widest))
                    width *= growth
                for depth in (1, 2):
                    found = _design(wanted, stem, widths, depth)
                    if fits(wanted, found):
                        yield found


def _start(wanted: Wanted) -> dict[str, int]:
    """Where the programs begin: the best of these that keeps the limits, or the nearest to that."""

    def order(choices: dict[str, int]) -> tuple[float, float]:
        numbers = deepmad.measured(wanted, choices)
        over = [numbers["flops"] / wanted.flops, numbers["params"] / wanted.params]
        if wanted.effectiveness is not None:
            over.append(numbers["effectiveness"] / wanted.effectiveness)
        return max(1.0, *over), -numbers["score"]

    return min(_starts(wanted), key=order)
