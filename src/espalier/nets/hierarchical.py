"""Vision transformers in stages, with fewer and wider tokens from each to the next.

After ViT-ResNAS (Liao, Karaman & Sze, Searching for Efficient Multi-Stage Vision Transformers,
2021, https://arxiv.org/abs/2109.00642). Differs in its sizes, which are made for small images, and
in that the mean of the tokens goes to the classifier.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from espalier.errors import SpaceError, unknown
from espalier.nets.blocks import Options, knob, per_stage, whole
from espalier.nets.elastic import Attention, Conv2d, Dim, LayerNorm, Linear, Parameter, Repeat
from espalier.nets.elastic import product as times
from espalier.nets.supernet import Supernet

Reduction = Literal["residual", "plain"]
Side = tuple[int, int]

WIDTHS: tuple[Options, ...] = ((16, 24, 32), (32, 48, 64), (64, 96, 128))
HEADS: tuple[Options, ...] = ((1, 2), (2, 3, 4), (4, 6, 8))
_LONGEST = 8  # tokens a side that the first stage is brought to, about


class HierarchicalViT(Supernet):
    """Multi-stage transformers for images `(channels, height, width)` of any size.

    Decisions: `stageN.width`, `stageN.depth`, `stageN.I.heads` and `stageN.I.ratio` (hidden width
    of the feed-forward layer over the stage's width). Each option set may be given, one a stage
    where it says so; one option fixes it.

    - `widths`, `heads`: one set a stage; how many there are is the number of stages.
    - `depth`: blocks a stage, or one set a stage.
    - `patch`: pixels a side of a token; by default so many that about 8 tokens are on a side.
    - `reduction`: how tokens get fewer between stages. "residual": a strided convolution of the
      normalised tokens beside a shortcut of their mean over 2x2; "plain": without the shortcut.
    """

    def __init__(
        self,
        shape: Sequence[int],
        classes: int,
        *,
        widths: Sequence[Options | int] | None = None,
        heads: Sequence[Options | int] | None = None,
        depth: Options | int = (1, 2, 3),
        ratio: Options | float = (1, 2, 3),
        head_width: int = 8,
        patch: int | None = None,
        reduction: Reduction = "residual",
    ) -> None:
        super().__init__(shape, classes)
        if reduction not in get_args(Reduction):
            raise SpaceError(unknown("reduction", reduction, get_args(Reduction)))
        stages = len(WIDTHS if widths is None else widths)
        found = per_stage("widths", widths, WIDTHS, stages)
        among = per_stage("heads", heads, HEADS[:stages], stages)
        pixels = max(1, min(self.shape[1:]) // _LONGEST) if patch is None else patch
        side: Side = (self.shape[1] // pixels, self.shape[2] // pixels)
        if min(side) < 1:
            raise SpaceError(
                f"patch is at most the image's shorter side, got {pixels} for {self.shape}"
            )
        width: Dim = whole("stage1.width", found[0])
        self.embed = Embed(self.shape[0], width, pixels, side)
        for index in range(stages):
            name = f"stage{index + 1}"
            if index > 0:
                out = whole(f"{name}.width", found[index])
                self.add_module(f"reduce{index}", Reduce(width, out, side, reduction))
                width, side = out, halved(side)
            self.add_module(name, _stage(name, width, among[index], depth, ratio, head_width))
        self.head = Head(width, self.classes)


class Embed(nn.Module):
    """Patches of an image as tokens `(b, n, width)`, with a learned position each."""

    def __init__(self, channels: int, width: Dim, patch: int, side: Side) -> None:
        super().__init__()
        # rows and columns that fill no patch are left out, as a strided convolution does
        self.patch = Conv2d(channels, width, patch, patch, padding=0)
        self.position = Parameter(side[0] * side[1], width)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        out: Tensor = tokens + self.position()
        return out


class Reduce(nn.Module):
    """A quarter of the tokens, with another width: `(b, h * w, in) -> (b, h * w / 4, out)`.

    Odd sides are rounded up.
    """

    def __init__(self, inputs: Dim, outputs: Dim, side: Side, reduction: Reduction) -> None:
        super().__init__()
        self.side = side
        self.norm = LayerNorm(inputs)
        self.conv = Conv2d(inputs, outputs, 3, 2)
        self.residual = reduction == "residual"
        if self.residual:
            odd = any(n % 2 for n in side)
            self.pool = nn.AvgPool2d(2, ceil_mode=odd)
            self.short = Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self._image(self.norm(x)))
        if self.residual:
            y = y + self.short(self.pool(self._image(x)))
        out: Tensor = y.flatten(2).transpose(1, 2)
        return out

    def _image(self, tokens: Tensor) -> Tensor:
        out: Tensor = torch.unflatten(tokens.transpose(1, 2), 2, self.side)
        return out


class Block(nn.Module):
    """Attention and a feed-forward layer, norms first, each beside a shortcut."""

    def __init__(self, width: Dim, heads: Dim, ratio: Dim | float, head_width: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attention = Attention(width, heads, head_width)
        self.norm2 = LayerNorm(width)
        hidden = times(width, ratio)
        self.up, self.act, self.down = Linear(width, hidden), nn.GELU(), Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.down(self.act(self.up(self.norm2(x))))
        return out


class Head(nn.Module):
    """The mean of the normalised tokens to a classifier: `(b, n, width) -> (b, classes)`."""

    def __init__(self, width: Dim, classes: int) -> None:
        super().__init__()
        self.norm = LayerNorm(width)
        self.linear = Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(self.norm(x).mean(1))
        return out


def halved(side: Side) -> Side:
    """The sides behind a stride of two; odd ones are rounded up."""
    return (side[0] + 1) // 2, (side[1] + 1) // 2


def _stage(
    name: str,
    width: Dim,
    heads: Options | int,
    depth: Options | int,
    ratio: Options | float,
    head_width: int,
) -> Repeat:
    def block(index: int) -> Block:
        return Block(
            width,
            whole(f"{name}.{index}.heads", heads),
            knob(f"{name}.{index}.ratio", ratio),
            head_width,
        )

    return Repeat(whole(f"{name}.depth", depth), block)
