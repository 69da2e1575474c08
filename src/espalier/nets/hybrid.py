"""Networks of convolutions whose last stage also attends, elastic in width, depth and expansion.

After EfficientFormerV2 (Li et al., Rethinking Vision Transformers for MobileNet Size and Speed,
2023, https://arxiv.org/abs/2212.08059): blocks are feed-forward layers with a depthwise convolution
inside, the stem and what is between stages are strided convolutions. Differs in its sizes, which
are made for small images, in ReLU, and in plain attention in the last stage only.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from espalier.nets.blocks import Options, conv_norm, knob, per_stage, strides, whole
from espalier.nets.elastic import Attention, BatchNorm2d, Dim, Linear, Repeat, product
from espalier.nets.supernet import Supernet

# By number of stages. Widths are multiples of 8, which kernels of every runtime like.
WIDTHS: dict[int, tuple[Options, ...]] = {
    3: ((8, 16), (16, 24, 32), (32, 48, 64)),
    4: ((8, 16), (16, 24, 32), (24, 32, 48), (48, 64, 80)),
    5: ((16, 24), (24, 32, 40), (32, 48, 64), (64, 80, 96), (96, 128, 160)),
}


class Hybrid(Supernet):
    """Convolutional stages and a last stage with attention, for images of any size.

    Decisions: `stageN.width`, `stageN.depth` and, for each block, `stageN.I.expansion` (inner width
    over outer). Each option set may be given; one option fixes it.

    - `widths`: one set a stage, the number of which follows from the size of the image.
    - `heads`, `head_width`: of the attention, which all blocks of the last stage have.
    """

    def __init__(
        self,
        shape: Sequence[int],
        classes: int,
        *,
        widths: Sequence[Options | int] | None = None,
        depth: Options | int = (1, 2, 3),
        expansion: Options | float = (1, 2, 3),
        heads: int = 4,
        head_width: int = 8,
    ) -> None:
        super().__init__(shape, classes)
        stem_stride, stage_strides = strides(self.shape)
        stages = len(stage_strides)
        found = per_stage("widths", widths, WIDTHS[stages], stages)
        width: Dim = whole("stage1.width", found[0])
        self.stem = conv_norm(self.shape[0], width, 3, stem_stride)
        for index, stride in enumerate(stage_strides, 1):
            name = f"stage{index}"
            if stride > 1:
                out = whole(f"{name}.width", found[index - 1])
                self.add_module(f"reduce{index - 1}", conv_norm(width, out, 3, stride, relu=False))
                width = out
            attends = (heads, head_width) if index == stages else None
            self.add_module(name, _stage(name, width, depth, expansion, attends))
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = Linear(width, self.classes)


class Mixing(nn.Module):
    """A feed-forward layer on pixels, with a depthwise convolution inside, beside a shortcut."""

    def __init__(self, width: Dim, expansion: Dim | float) -> None:
        super().__init__()
        inner = product(width, expansion)
        self.expand = conv_norm(width, inner)
        self.filter = conv_norm(inner, inner, 3, depthwise=True)
        self.project = conv_norm(inner, width, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.project(self.filter(self.expand(x)))
        return out


class Attending(nn.Module):
    """Attention over all pixels `(b, c, h, w)`, beside a shortcut, and then a `Mixing`."""

    def __init__(self, width: Dim, expansion: Dim | float, heads: int, head_width: int) -> None:
        super().__init__()
        self.norm = BatchNorm2d(width)
        self.attention = Attention(width, heads, head_width)
        self.mixing = Mixing(width, expansion)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        seen = self.attention(tokens).transpose(1, 2)
        out: Tensor = self.mixing(x + seen.reshape(x.shape))
        return out


def _stage(
    name: str,
    width: Dim,
    depth: Options | int,
    expansion: Options | float,
    attends: tuple[int, int] | None,
) -> Repeat:
    def block(index: int) -> nn.Module:
        ratio = knob(f"{name}.{index}.expansion", expansion)
        return Mixing(width, ratio) if attends is None else Attending(width, ratio, *attends)

    return Repeat(whole(f"{name}.depth", depth), block)
