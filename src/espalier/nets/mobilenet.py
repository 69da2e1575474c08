"""A family of MobileNets, elastic in resolution, width, depth, kernel and expansion.

Inverted residuals of MobileNetV2 (Sandler et al., 2018) with the decisions of Once-for-All
(Cai et al., 2020). Differs from both in its sizes, which are made for small images, and in that
the activation is ReLU throughout, which runtimes fuse best.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from espalier.nets.blocks import Options, conv_norm, knob, per_stage, resolutions, strides, whole
from espalier.nets.elastic import Dim, Linear, Repeat, Resize, product
from espalier.nets.supernet import Supernet

# By number of stages. Widths are multiples of 8, which kernels of every runtime like.
STEM = {3: (8, 16), 4: (8, 16, 24), 5: (16, 24, 32)}
WIDTHS: dict[int, tuple[Options, ...]] = {
    3: ((8, 16), (16, 24, 32), (24, 32, 48)),
    4: ((8, 16), (16, 24, 32), (24, 32, 48), (32, 48, 64)),
    5: ((16, 24), (24, 32, 40), (32, 48, 64), (64, 80, 96), (96, 128, 160)),
}
HEAD: dict[int, Options] = {3: (32, 64, 96), 4: (64, 96, 128), 5: (128, 256, 384)}


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project `(b, in, h, w) -> (b, out, h/stride, w/stride)`."""

    def __init__(
        self,
        inputs: Dim,
        outputs: Dim,
        kernel: Dim,
        expansion: Dim | float,
        stride: int,
        residual: bool,
        transform: bool = False,
    ) -> None:
        super().__init__()
        inner = product(inputs, expansion)
        self.residual = residual
        self.expand = conv_norm(inputs, inner)
        self.filter = conv_norm(inner, inner, kernel, stride, depthwise=True, transform=transform)
        self.project = conv_norm(inner, outputs, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.project(self.filter(self.expand(x)))
        return x + y if self.residual else y


class MobileNet(Supernet):
    """MobileNets for images `(channels, height, width)` of any size.

    Decisions: `resolution`, `stem.width`, `stageN.width`, `stageN.depth`, `stageN.I.kernel`,
    `stageN.I.expansion`, `head.width`. Each option set may be given; one option fixes it.

    - `resolution`: heights in pixels; by default the native one and smaller ones of images from
      16 pixels on. The network takes the native shape in any case.
    - `stem`, `head`: widths in channels. `widths`: one set a stage, the number of which follows
      from the size of the image.
    - `depth`: blocks a stage. `kernel`: odd. `expansion`: inner width over outer.
    - `transform`: smaller kernels are learned transforms of the larger ones, as in Once-for-All.
    """

    def __init__(
        self,
        shape: Sequence[int],
        classes: int,
        resolution: Options | int | None = None,
        *,
        stem: Options | int | None = None,
        widths: Sequence[Options | int] | None = None,
        depth: Options | int = (1, 2, 3),
        kernel: Options | int = (3, 5),
        expansion: Options | float = (2, 3, 4),
        head: Options | int | None = None,
        transform: bool = False,
    ) -> None:
        super().__init__(shape, classes)
        stem_stride, stage_strides = strides(self.shape)
        stages = len(stage_strides)
        found = per_stage("widths", widths, WIDTHS[stages], stages)
        height = resolutions(self.shape) if resolution is None else resolution
        self.resize = Resize(whole("resolution", height), self.shape)
        width: Dim = whole("stem.width", STEM[stages] if stem is None else stem)
        self.stem = conv_norm(self.shape[0], width, 3, stem_stride)
        for index, stride in enumerate(stage_strides, 1):
            name = f"stage{index}"
            out = whole(f"{name}.width", found[index - 1])
            inner = (depth, kernel, expansion, transform)
            self.add_module(name, _stage(name, width, out, stride, *inner))
            width = out
        last = whole("head.width", HEAD[stages] if head is None else head)
        self.head = _head(width, last, self.classes)


def _stage(
    name: str,
    inputs: Dim,
    width: Dim,
    stride: int,
    depth: Options | int,
    kernel: Options | int,
    expansion: Options | float,
    transform: bool,
) -> Repeat:
    def block(index: int) -> InvertedResidual:
        return InvertedResidual(
            inputs if index == 0 else width,
            width,
            whole(f"{name}.{index}.kernel", kernel),
            knob(f"{name}.{index}.expansion", expansion),
            stride if index == 0 else 1,
            residual=index > 0,
            transform=transform,
        )

    return Repeat(whole(f"{name}.depth", depth), block)


def _head(inputs: Dim, width: Dim, classes: int) -> nn.Sequential:
    mixed = conv_norm(inputs, width)
    layers: list[tuple[str, nn.Module]] = [
        *mixed.named_children(),
        ("pool", nn.AdaptiveAvgPool2d(1)),
        ("flatten", nn.Flatten()),
        ("linear", Linear(width, classes)),
    ]
    return nn.Sequential(OrderedDict(layers))
