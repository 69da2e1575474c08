"""Small vision transformers: patches of an image as tokens, their mean to a classifier.

Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, https://arxiv.org/abs/2010.11929.
Differs in that the patches may overlap (As-ViT, Chen et al., 2022) and in the mean in the place of
a class token.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from espalier.errors import SpaceError
from espalier.nets.family import Family
from espalier.nets.plain import traced
from espalier.nets.transformer import Body, whole_heads
from espalier.space import Candidate, Space, choice, ordinal


class _Encoder(nn.Module):
    def __init__(
        self,
        channels: int,
        side: tuple[int, int],
        classes: int,
        kernel: int,
        stride: int,
        depth: int,
        width: int,
        heads: int,
        hidden: int,
    ) -> None:
        super().__init__()
        # padded so that kernels of all sizes give the same tokens: one a stride
        over = kernel - stride
        self.pad = nn.ZeroPad2d((over // 2, over - over // 2) * 2) if over > 0 else nn.Identity()
        self.patch = nn.Conv2d(channels, width, kernel, stride)
        self.flatten = nn.Flatten(2)
        tokens = (side[0] // stride) * (side[1] // stride)
        self.body = Body(depth, width, heads, hidden, tokens, causal=False)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.flatten(self.patch(self.pad(x))).transpose(1, 2)
        out: Tensor = self.head(self.body(tokens).mean(1))
        return out


class ViT(Family):
    """Vision transformers for images `(channels, height, width)` whose sides `stride` divides.

    Decisions: `kernel` of the patches, their `stride`, `depth`, `width`, `ratio` (hidden width of
    the feed-forward layers over the width) and `heads` (the nearest number below where they don't
    divide the width).
    """

    name = "vit"

    def __init__(
        self,
        shape: Sequence[int] = (1, 8, 8),
        classes: int = 10,
        kernel: Sequence[int] = (2, 3, 4),
        stride: Sequence[int] = (2,),
        depth: Sequence[int] = (1, 2, 3, 4, 6),
        width: Sequence[int] = (8, 12, 16, 24, 32, 48),
        ratio: Sequence[float] = (0.5, 1, 2, 4),
        heads: Sequence[int] = (1, 2, 4),
    ) -> None:
        whole = all(n % s == 0 for n in shape[1:] for s in stride)
        if len(shape) != 3 or not whole or min(kernel) < max(stride):
            raise SpaceError(
                f"vit takes an image's shape (channels, height, width), strides that divide its "
                f"sides and kernels no smaller, got {tuple(shape)}, {tuple(stride)} and "
                f"{tuple(kernel)}"
            )
        self.shape, self.classes = tuple(int(n) for n in shape), int(classes)
        self._space = Space(
            [
                choice("kernel", *kernel),
                choice("stride", *stride),
                ordinal("depth", *depth),
                ordinal("width", *width),
                ordinal("ratio", *ratio),
                choice("heads", *heads),
            ]
        )

    @property
    def space(self) -> Space:
        """Six decisions."""
        return self._space

    def build(self, candidate: Candidate) -> nn.Module:
        """The transformer of a candidate."""
        chosen = self._space.candidate(candidate)
        kernel, stride, depth, width, heads = (
            int(chosen[k]) for k in ("kernel", "stride", "depth", "width", "heads")
        )
        hidden = max(1, round(float(chosen["ratio"]) * width))
        channels, height, wide = self.shape
        made = _Encoder(
            channels,
            (height, wide),
            self.classes,
            kernel,
            stride,
            depth,
            width,
            whole_heads(width, heads),
            hidden,
        )
        return traced(made, "ViT")
