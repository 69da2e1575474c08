"""Networks whose blocks are a pool, attention or nothing: the space that EfficientFormer slims.

After EfficientFormer (Li et al., Vision Transformers at MobileNet Speed, 2022,
https://arxiv.org/abs/2206.01191): the token mixer of a block on images is an average pool, that of a
block on tokens is attention, which only the last stage offers. Differs in its sizes, which are made
for small images, and in ReLU.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from espalier.errors import SpaceError
from espalier.nets.blocks import Options, conv_norm, per_stage, strides, whole
from espalier.nets.elastic import Attention, Dim, LayerNorm, Linear, OneOf, Repeat, product
from espalier.nets.supernet import Supernet
from espalier.space import Option, choice

IDENTITY, POOL, ATTENTION = "identity", "pool", "attention"
# By number of stages.
WIDTHS: dict[int, tuple[Options, ...]] = {
    3: ((8, 12, 16), (16, 20, 24, 28, 32), (24, 32, 40, 48, 56, 64)),
    4: ((8, 16), (16, 24, 32), (24, 32, 40, 48), (32, 48, 64, 80)),
    5: ((16, 24), (24, 32, 40), (32, 48, 64), (64, 80, 96), (96, 128, 160)),
}


class MetaPath(Supernet):
    """Stages of blocks, each one of several operators, for images of any size.

    Decisions: `stageN.width` and `stageN.I.op`, among "identity", "pool" and, in the last stage,
    "attention". Widths may be given; one option fixes a width, and `fixed` all operators at the last.

    - `widths`: one set a stage, the number of which follows from the size of the image.
    - `depth`: blocks a stage. `expansion`: inner width of the feed-forward layers over outer.
    - `head_width`, `heads`: of attention.
    """

    def __init__(
        self,
        shape: Sequence[int],
        classes: int,
        *,
        widths: Sequence[Options | int] | None = None,
        depth: int = 2,
        expansion: int = 3,
        heads: int = 4,
        head_width: int = 8,
        fixed: bool = False,
    ) -> None:
        super().__init__(shape, classes)
        if depth < 1:
            raise SpaceError(f"depth must be a whole number from 1, got {depth!r}")
        stem_stride, stage_strides = strides(self.shape)
        stages = len(stage_strides)
        found = per_stage("widths", widths, WIDTHS[stages], stages)
        width: Dim = whole("stage1.width", found[0])
        self.stem = conv_norm(self.shape[0], width, 3, stem_stride)
        for index, stride in enumerate(stage_strides, 1):
            if stride > 1:
                out = whole(f"stage{index}.width", found[index - 1])
                self.add_module(f"reduce{index - 1}", conv_norm(width, out, 3, stride, relu=False))
                width = out
            attends = (heads, head_width) if index == stages else None
            blocks = [
                _block(f"stage{index}.{i}.op", width, expansion, attends, fixed)
                for i in range(depth)
            ]
            self.add_module(f"stage{index}", Repeat(depth, blocks.__getitem__))
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = Linear(width, self.classes)


class Pooling(nn.Module):
    """An average over 3x3 pixels and a feed-forward layer, each beside a shortcut."""

    def __init__(self, width: Dim, expansion: int) -> None:
        super().__init__()
        inner = product(width, expansion)
        self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        self.up = conv_norm(width, inner)
        self.down = conv_norm(inner, width, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.pool(x)
        out: Tensor = x + self.down(self.up(x))
        return out


class Attending(nn.Module):
    """Attention over all pixels `(b, c, h, w)` and a feed-forward layer, each beside a shortcut."""

    def __init__(self, width: Dim, expansion: int, heads: int, head_width: int) -> None:
        super().__init__()
        inner = product(width, expansion)
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(width)
        self.attention = Attention(width, heads, head_width)
        self.up, self.relu, self.down = Linear(width, inner), nn.ReLU(), Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.attention(self.norm1(tokens))
        tokens = tokens + self.down(self.relu(self.up(self.norm2(tokens))))
        out: Tensor = tokens.transpose(1, 2).reshape(x.shape)
        return out


def _block(
    name: str, width: Dim, expansion: int, attends: tuple[int, int] | None, fixed: bool
) -> nn.Module:
    options: dict[Option, nn.Module] = {IDENTITY: nn.Identity(), POOL: Pooling(width, expansion)}
    if attends is not None:
        options[ATTENTION] = Attending(width, expansion, *attends)
    return list(options.values())[-1] if fixed else OneOf(choice(name, *options), options)
