"""A small space of networks for 8x8 images, every one of which was trained for the table "digits".

Two stages, at full and at half size, of up to two layers each; a layer is one of four operations.
Depths are decisions and the layers hang on them, so that no network is written in two ways.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from espalier.errors import SpaceError
from espalier.nets.family import Family
from espalier.nets.graphs import Graphs
from espalier.space import Candidate, Space, choice, integer, ordinal

WIDTHS = (4, 8, 16)
OPERATIONS = ("pool", "conv1", "sep3", "conv3")
HEADS = ("mean", "flat")
STAGES = 2
LAYERS = 2  # a stage, at most
# of batch-norm statistics: the trainings of the table have but ten batches an epoch
MOMENTUM = 0.3


class DigitsCells(Family):
    """2,646 plain convolutional networks for images `(channels, height, width)` of 8 pixels or so.

    Decisions: `width` of the first stage (the second has twice as much); `head`: the mean over
    positions or all of them, before the linear layer; for stage s of 1, 2: `depth{s}` of 0..2
    layers, and `op{s}.{i}` of each. Operations, each followed by batch-norm and ReLU where it has
    weights: `pool` (mean of 3x3, none), `conv1`, `sep3` (3x3 a channel, then 1x1), `conv3`.
    A 3x3 stem goes first; between the stages a 2x2 maximum and a 1x1 convolution.
    Errors: `SpaceError` for a shape that can't be halved.
    """

    name = "digits_cells"

    def __init__(self, shape: Sequence[int] = (1, 8, 8), classes: int = 10) -> None:
        self.shape, self.classes = tuple(int(n) for n in shape), int(classes)
        if len(self.shape) != 3 or min(self.shape[1:]) < 2 or self.shape[0] < 1:
            rule = "digits_cells takes images (channels, height, width) of at least 2x2 pixels"
            raise SpaceError(f"{rule}, got shape {tuple(shape)}")
        self._space = Space(
            [
                ordinal("width", *WIDTHS),
                choice("head", *HEADS),
                *(decision for stage in range(1, STAGES + 1) for decision in _stage(stage)),
            ]
        )

    @property
    def space(self) -> Space:
        """Eight decisions, of which layers beyond a stage's depth are inactive."""
        return self._space

    def build(self, candidate: Candidate) -> nn.Module:
        """The network, with fresh weights from torch's generator."""
        width = int(candidate["width"])
        channels, height, across = self.shape
        positions = (height // 2) * (across // 2)
        parts: list[tuple[str, nn.Module]] = [("stem", _conv(channels, width, 3))]
        for stage in range(1, STAGES + 1):
            if stage > 1:
                parts.append((f"down{stage}", nn.MaxPool2d(2)))
                parts.append((f"wide{stage}", _conv(width, 2 * width, 1)))
                width *= 2
            for i in range(int(candidate[f"depth{stage}"])):
                parts.append((f"stage{stage}_{i}", _layer(candidate[f"op{stage}.{i}"], width)))
        if candidate["head"] == "mean":
            parts.append(("pool", nn.AdaptiveAvgPool2d(1)))
            positions = 1
        parts.append(("flatten", nn.Flatten()))
        parts.append(("linear", nn.Linear(width * positions, self.classes)))
        return nn.Sequential(OrderedDict(parts))

    def counts(self, codes: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Parameters and multiply-accumulates `(n,)` of codes, by formula: nothing is built."""
        at = {name: j for j, name in enumerate(self.space.names)}
        channels, height, across = self.shape
        c = np.asarray(WIDTHS, dtype=np.int64)[codes[:, at["width"]].astype(np.int64)]
        pixels = height * across
        params = 9 * channels * c + 2 * c
        macs = 9 * channels * c * pixels
        for stage in range(1, STAGES + 1):
            if stage > 1:
                pixels = (height // 2) * (across // 2)
                params, macs = params + 2 * c * c + 4 * c, macs + 2 * c * c * pixels
                c = 2 * c
            # weights of a layer, and those of its batch-norm, in the order of OPERATIONS
            weights = np.stack([0 * c, c * c, 9 * c + c * c, 9 * c * c], axis=1)
            norms = np.stack([0 * c, 2 * c, 2 * c, 2 * c], axis=1)
            for i in range(LAYERS):
                on = codes[:, at[f"depth{stage}"]] > i
                index = codes[:, at[f"op{stage}.{i}"]].astype(np.int64)[:, None]
                weight = on * np.take_along_axis(weights, index, axis=1)[:, 0]
                params = params + weight + on * np.take_along_axis(norms, index, axis=1)[:, 0]
                macs = macs + weight * pixels
        flat = codes[:, at["head"]] == HEADS.index("flat")
        linear = np.where(flat, pixels, 1) * c * self.classes
        return params + linear + self.classes, macs + linear

    def graphs(self, codes: NDArray[Any]) -> Graphs:
        """The networks as operator graphs, a chain each: "conv3/8" is a 3x3 of 8 channels."""
        words = [_words(candidate) for candidate in self.space.decode(codes)]
        vocabulary = ("", *sorted(_vocabulary()))
        number = {word: i for i, word in enumerate(vocabulary)}
        longest = STAGES * LAYERS + 5  # input, stem, wide, head, output
        operators = np.zeros((len(words), longest), dtype=np.int64)
        adjacency = np.zeros((len(words), longest, longest), dtype=np.bool_)
        for i, chain in enumerate(words):
            operators[i, : len(chain)] = [number[word] for word in chain]
            steps = np.arange(len(chain) - 1)
            adjacency[i, steps, steps + 1] = True
        return Graphs(operators, adjacency, vocabulary)


def _stage(stage: int) -> list[Any]:
    depth = f"depth{stage}"
    layers = [
        choice(f"op{stage}.{i}", *OPERATIONS, when={depth: tuple(range(i + 1, LAYERS + 1))})
        for i in range(LAYERS)
    ]
    return [integer(depth, 0, LAYERS), *layers]


def _conv(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs, momentum=MOMENTUM),
        nn.ReLU(),
    )


def _layer(operation: Any, width: int) -> nn.Module:
    if operation == "pool":
        return nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
    if operation == "sep3":
        by_channel = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        return nn.Sequential(by_channel, *_conv(width, width, 1))
    return _conv(width, width, 3 if operation == "conv3" else 1)


def _words(candidate: Candidate) -> list[str]:
    width, out = int(candidate["width"]), ["input"]
    for stage in range(1, STAGES + 1):
        out.append(f"{'stem' if stage == 1 else 'wide'}/{width}")
        depth = int(candidate[f"depth{stage}"])
        out += [f"{candidate[f'op{stage}.{i}']}/{width}" for i in range(depth)]
        width *= 2
    return [*out, str(candidate["head"]), "output"]


def _vocabulary() -> set[str]:
    widths = {w * 2**s for w in WIDTHS for s in range(STAGES)}
    layers = {f"{word}/{w}" for word in (*OPERATIONS, "stem", "wide") for w in widths}
    return {*layers, *HEADS, "input", "output"}
