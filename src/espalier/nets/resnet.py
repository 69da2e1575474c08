"""A family of ResNets, elastic in resolution, width, depth and kernel.

Basic blocks of ResNet (He et al., 2016) in the small-image form. Differs in that the first
convolution of a block has an elastic kernel, and in its widths. The last norm of a block does not
start from zero: blocks that do nothing at first learn slower where many networks share them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from espalier.nets.blocks import Options, conv_norm, per_stage, resolutions, strides, whole
from espalier.nets.elastic import Dim, Linear, Repeat, Resize
from espalier.nets.supernet import Supernet

# By number of stages. Widths are multiples of 8, which kernels of every runtime like.
WIDTHS: dict[int, tuple[Options, ...]] = {
    3: ((8, 16), (16, 24, 32), (24, 32, 48)),
    4: ((8, 16), (16, 24, 32), (24, 32, 48), (32, 48, 64)),
    5: ((16, 24), (24, 32, 40), (32, 48, 64), (64, 80, 96), (96, 128, 160)),
}


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut `(b, in, h, w) -> (b, out, h/stride, w/stride)`."""

    def __init__(
        self, inputs: Dim, outputs: Dim, kernel: Dim, stride: int, projected: bool
    ) -> None:
        super().__init__()
        self.first = conv_norm(inputs, outputs, kernel, stride)
        self.second = conv_norm(outputs, outputs, 3, relu=False)
        self.shortcut: nn.Module = (
            conv_norm(inputs, outputs, 1, stride, relu=False) if projected else nn.Identity()
        )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(self.second(self.first(x)) + self.shortcut(x))
        return out


class ResNet(Supernet):
    """ResNets for images `(channels, height, width)` of any size.

    Decisions: `resolution`, `stageN.width`, `stageN.depth`, `stageN.I.kernel`. Each option set may
    be given; one option fixes it.

    - `resolution`: heights in pixels; by default the native one and smaller ones of images from
      16 pixels on. The network takes the native shape in any case.
    - `widths`: channels, one set a stage; the stem has the width of the first stage. The number
      of stages follows from the size of the image.
    - `depth`: blocks a stage. `kernel`: odd.
    """

    def __init__(
        self,
        shape: Sequence[int],
        classes: int,
        resolution: Options | int | None = None,
        *,
        widths: Sequence[Options | int] | None = None,
        depth: Options | int = (1, 2, 3),
        kernel: Options | int = (3, 5),
    ) -> None:
        super().__init__(shape, classes)
        stem_stride, stage_strides = strides(self.shape)
        found = per_stage("widths", widths, WIDTHS[len(stage_strides)], len(stage_strides))
        height = resolutions(self.shape) if resolution is None else resolution
        self.resize = Resize(whole("resolution", height), self.shape)
        width = whole("stage1.width", found[0])
        self.stem = conv_norm(self.shape[0], width, 3, stem_stride)
        for index, stride in enumerate(stage_strides, 1):
            name = f"stage{index}"
            out = whole(f"{name}.width", found[index - 1])
            self.add_module(name, _stage(name, width, out, stride, depth, kernel, index > 1))
            width = out
        layers: list[tuple[str, nn.Module]] = [
            ("pool", nn.AdaptiveAvgPool2d(1)),
            ("flatten", nn.Flatten()),
            ("linear", Linear(width, self.classes)),
        ]
        self.head = nn.Sequential(OrderedDict(layers))


def _stage(
    name: str,
    inputs: Dim,
    width: Dim,
    stride: int,
    depth: Options | int,
    kernel: Options | int,
    projected: bool,
) -> Repeat:
    def block(index: int) -> BasicBlock:
        first = index == 0
        return BasicBlock(
            inputs if first else width,
            width,
            whole(f"{name}.{index}.kernel", kernel),
            stride if first else 1,
            projected=projected and first,
        )

    return Repeat(whole(f"{name}.depth", depth), block)
