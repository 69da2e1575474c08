"""NAS-Bench-Macro's networks: a chain of eight layers, each an identity or an inverted residual.

Su, Huang, Li, You, Wang, Qian, Zhang & Xu, "Prioritized Architecture Sampling with Monte-Carlo Tree
Search", CVPR 2021 (https://arxiv.org/abs/2103.11922); widths and strides after
https://github.com/xiusu/NAS-Bench-Macro. Blocks are MobileNetV2's (Sandler et al., 2018) with ReLU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from espalier.errors import SpaceError
from espalier.nets.family import Family
from espalier.nets.graphs import Graphs
from espalier.nets.wired import Wire, Wired
from espalier.space import Candidate, Space, choice

BLOCKS = ("identity", "mb3_k3", "mb6_k5")
STAGES = (2, 3, 3)  # layers; the first of a stage halves the image and doubles the channels
STEM, HEAD = 32, 1280  # channels
LAYERS = sum(STAGES)
SPACE = Space([choice(f"layer{i}", *BLOCKS) for i in range(LAYERS)])
VOCABULARY = ("", "input", "stem", *BLOCKS, "reduce", "output")

_FIRST = tuple(sum(STAGES[:i]) for i in range(len(STAGES)))
_SIZES = {"mb3_k3": (3, 3), "mb6_k5": (6, 5)}  # expansion, kernel
Layers = Iterator[tuple[str, nn.Module]]


class NBMacro(Family):
    """The 6,561 networks of NAS-Bench-Macro for images `(channels, height, width)`.

    Decisions `layer0` to `layer7`: identity, or an inverted residual of expansion 3 and kernel 3,
    or of expansion 6 and kernel 5. Where a layer changes the size, identity is a 1x1 convolution.
    """

    name = "nb_macro"

    def __init__(self, shape: Sequence[int] = (3, 32, 32), classes: int = 10) -> None:
        if len(shape) != 3 or min((*shape, classes)) < 1:
            raise SpaceError(
                "nb_macro takes an image's shape (channels, height, width) and a number of "
                f"classes, got {tuple(shape)} and {classes}"
            )
        self.shape, self.classes = tuple(int(n) for n in shape), int(classes)

    @property
    def space(self) -> Space:
        """Eight choices among three blocks."""
        return SPACE

    def build(self, candidate: Candidate) -> nn.Module:
        """The network, `(b, channels, height, width)` to `(b, classes)`."""
        chosen = SPACE.candidate(candidate)
        net, width = Wired(), STEM
        wire = net.chain("stem", _conv(self.shape[0], STEM, 3), net.input)
        for index in range(LAYERS):
            first = index in _FIRST
            out = 2 * width if first else width
            block = str(chosen[f"layer{index}"])
            wire = _block(net, f"layer{index}", block, width, out, 2 if first else 1, wire)
            width = out
        return net.network(net.chain("head", _head(width, self.classes), wire), "NBMacro")

    def graphs(self, codes: NDArray[Any]) -> Graphs:
        """Chains of operators: input, stem, eight layers, output.

        "reduce" is the convolution that stands for an identity where the size changes.
        """
        return graphs(codes)


def graphs(codes: NDArray[Any]) -> Graphs:
    """As `NBMacro.graphs`, for codes `(n, 8)`."""
    n, nodes = len(codes), LAYERS + 3
    operators = np.zeros((n, nodes), dtype=np.int64)
    operators[:, 0], operators[:, 1] = 1, 2
    operators[:, 2:-1] = np.asarray(codes, dtype=np.int64) + VOCABULARY.index(BLOCKS[0])
    for index in _FIRST:
        idle = np.asarray(codes)[:, index] == 0
        operators[idle, index + 2] = VOCABULARY.index("reduce")
    operators[:, -1] = len(VOCABULARY) - 1
    chain = np.eye(nodes, k=1, dtype=np.bool_)
    return Graphs(operators, np.repeat(chain[None], n, axis=0), VOCABULARY)


def _block(
    net: Wired, name: str, block: str, inputs: int, outputs: int, stride: int, wire: Wire
) -> Wire:
    if block == "identity":
        if stride == 1 and inputs == outputs:
            return wire
        return net.chain(name, _conv(inputs, outputs, 1, stride, relu=False), wire)
    expansion, kernel = _SIZES[block]
    wide = expansion * inputs
    out = net.chain(f"{name}.expand", _conv(inputs, wide), wire)
    out = net.chain(f"{name}.filter", _conv(wide, wide, kernel, stride, groups=wide), out)
    out = net.chain(f"{name}.project", _conv(wide, outputs, relu=False), out)
    return net.add([out, wire]) if stride == 1 and inputs == outputs else out


def _conv(
    inputs: int,
    outputs: int,
    kernel: int = 1,
    stride: int = 1,
    groups: int = 1,
    relu: bool = True,
) -> Layers:
    padding = kernel // 2
    yield "conv", nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
    yield "norm", nn.BatchNorm2d(outputs)
    if relu:
        yield "relu", nn.ReLU()


def _head(inputs: int, classes: int) -> Layers:
    yield from _conv(inputs, HEAD)
    yield "pool", nn.AdaptiveAvgPool2d(1)
    yield "flatten", nn.Flatten()
    yield "linear", nn.Linear(HEAD, classes)
