"""Entropy, effectiveness and cost of a chain of bottlenecks in closed form, for whole tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.nets.bottlenecks import Layout

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Wanted:
    """What a design is made for: its layout, the image's height, weights of stages, limits.

    `flops` are multiply-accumulates with norms, activations and additions, as the authors' own
    counter has them, `params` those without a classifier. `effectiveness` None: no limit.
    `uneven` is the first group whose depth is to be even with the later ones'. Without `sized` the
    height of feature maps does not count, as in the authors' counter of depthwise blocks. With `classes`
    costs are the package's own instead: `flops` are the multiply-accumulates of all convolutions and
    of the classifier and nothing else, `params` all of them.
    """

    layout: Layout
    resolution: int
    flops: float
    params: float
    effectiveness: float | None = 0.3
    weights: tuple[float, ...] = (1, 1, 1, 1, 8)
    uneven: int = 0
    penalty: float = 10.0
    kernels: tuple[int, ...] = (3, 5)
    stems: tuple[int, ...] = (8, 16, 24, 32)
    widest: int = 2048
    deepest: int = 20
    channels: int = 3
    sized: bool = True
    classes: int = 0

    @property
    def beside(self) -> int:
        """Flops of a norm, an activation and an addition behind one output, where they count."""
        return 0 if self.classes else 3

    @property
    def stages(self) -> tuple[int, ...]:
        """The stage of each group, from 0: a new one begins where the stride is 2."""
        found, stage = [], 0
        for stride in self.layout.strides:
            stage += stride == 2
            found.append(stage)
        return tuple(found)

    @property
    def sides(self) -> tuple[int, ...]:
        """The height of what goes into each group, and of what comes out of the last."""
        out = [self.resolution // self.layout.stem_stride]
        for stride in self.layout.strides:
            out.append(out[-1] // stride)
        return tuple(out)

    def depth_penalty(self, depths: Any) -> Any:
        """What uneven depths `(..., groups)` cost."""
        spread = np.std(np.asarray(depths, dtype=float)[..., self.uneven :], axis=-1)
        return self.penalty * np.exp(spread)


def entropy(wanted: Wanted, inputs: Any, inner: Any, kernel: Any) -> Any:
    """Half the sum of the logs of fan-ins of a block; twice that is the log of its width."""
    twice = 1.0 if wanted.layout.depthwise else 2.0
    return 0.5 * (np.log(inputs) + 2.0 * np.log(kernel) + twice * np.log(inner))


def narrowing(wanted: Wanted, n: int, inputs: Any, inner: Any) -> tuple[Any, Any]:
    """Flops and parameters of a group's first convolution."""
    side = wanted.sides[n] ** 2
    return side * (inputs * inner + wanted.beside * inner), inputs * inner + 2 * inner


def projecting(wanted: Wanted, n: int, inputs: Any, out: Any) -> tuple[Any, Any]:
    """Flops and parameters of what leads around a group's first block."""
    stride, side = wanted.layout.strides[n], wanted.sides[n] ** 2
    after = wanted.sides[n + 1] ** 2
    pooled = side * (stride == 2 and not wanted.classes) * inputs
    if wanted.layout.depthwise:
        return pooled * (inputs == out), 0.0 * inputs * out
    return pooled + after * (inputs * out + wanted.beside * out), inputs * out + 2 * out


def rest(wanted: Wanted, n: int, inner: Any, kernel: Any, out: Any, depth: Any) -> tuple[Any, Any]:
    """Flops and parameters of all else of a group of `depth` blocks."""
    side = wanted.sides[n + 1] ** 2
    fan = 1.0 if wanted.layout.depthwise else inner
    filters, widening = inner * fan * kernel**2, inner * out
    more = wanted.beside
    flops = side * depth * (filters + more * inner + widening + more * out)
    flops = flops + side * (depth - 1) * (widening + more * inner)
    params = depth * (filters + 2 * inner + widening + 2 * out)
    params = params + (depth - 1) * (widening + 2 * inner)
    if wanted.layout.depthwise:
        squeezed = np.maximum(1, np.round(inner * 0.25) // 8) * 8
        params = params + depth * (2 * inner * squeezed + 2 * inner + 2 * squeezed)
        if wanted.classes:  # on one pixel; the authors' counter leaves them out
            flops = flops + depth * 2 * inner * squeezed
    return flops, params


def ends(wanted: Wanted, stem: Any, last: Any) -> tuple[Any, Any]:
    """Flops and parameters of the stem, of the head and of the classifier, where it counts."""
    side, head = (wanted.resolution / wanted.layout.stem_stride) ** 2, wanted.layout.head
    fan = 9 * wanted.channels
    more, classes = wanted.beside, wanted.classes
    flops, params = side * (fan * stem + more * stem), fan * stem + 2 * stem
    if head:
        flops = flops + wanted.sides[-1] ** 2 * (last * head + more * head)
        params = params + last * head + 2 * head
    features = head or last
    flops, params = flops + features * classes, params + features * classes + classes
    return flops, params


@dataclass(frozen=True)
class Stage:
    """The end of a stage: channels, side, entropy up to there, layers up to there."""

    channels: float
    side: int
    entropy: float
    layers: int

    @property
    def size(self) -> float:
        """The log of the size of its feature map."""
        return math.log(self.channels * self.side**2)

    @property
    def effectiveness(self) -> float:
        """Layers over the geometric mean of their widths."""
        return self.layers / math.exp(2 * self.entropy / self.layers)


def stages(wanted: Wanted, choices: Mapping[str, Any]) -> list[Stage]:
    """The ends of all stages of a design."""
    layout = wanted.layout
    width, total, layers = choices["stem"], 0.5 * math.log(9 * wanted.channels), 1
    found = []
    sides = wanted.sides if wanted.sized else (1,) * (len(layout.strides) + 1)
    for n, (name, stride) in enumerate(zip(layout.groups, layout.strides, strict=True)):
        if stride == 2:
            found.append(Stage(width, sides[n], total, layers))
        out, inner, kernel, depth = (
            choices[f"{name}.{part}"] for part in ("out", "inner", "kernel", "depth")
        )
        total += float(entropy(wanted, width, inner, kernel))
        total += (depth - 1) * float(entropy(wanted, out, inner, kernel))
        layers += 3 * depth
        width = out
    if layout.head:
        total, layers, width = total + 0.5 * math.log(width), layers + 1, layout.head
    return [*found, Stage(width, sides[-1], total, layers)]


def measured(wanted: Wanted, choices: Mapping[str, Any]) -> dict[str, float]:
    """score, effectiveness, flops and params of a design."""
    layout, found = wanted.layout, stages(wanted, choices)
    total = sum(w * s.size * s.entropy for w, s in zip(wanted.weights, found, strict=True))
    depths = [choices[f"{name}.depth"] for name in layout.groups]
    flops, params = ends(wanted, choices["stem"], choices[f"{layout.groups[-1]}.out"])
    width = choices["stem"]
    for n, name in enumerate(layout.groups):
        out, inner, kernel, depth = (
            choices[f"{name}.{part}"] for part in ("out", "inner", "kernel", "depth")
        )
        for part in (
            narrowing(wanted, n, width, inner),
            projecting(wanted, n, width, out),
            rest(wanted, n, inner, kernel, out, depth),
        ):
            flops, params = flops + part[0], params + part[1]
        width = out
    return {
        "score": float(total - wanted.depth_penalty(depths)),
        "effectiveness": max(s.effectiveness for s in found),
        "flops": float(flops),
        "params": float(params),
    }


def kept(wanted: Wanted, found: Mapping[str, float]) -> bool:
    """Whether a design's numbers are within the limits."""
    rho = wanted.effectiveness
    fits = found["flops"] <= wanted.flops and found["params"] <= wanted.params
    return fits and (rho is None or found["effectiveness"] <= rho)
