"""NAS-Bench-201's cells, and the network that is made of one.

Dong & Yang, "NAS-Bench-201: Extending the Scope of Reproducible Neural Architecture Search", 2020
(https://arxiv.org/abs/2001.00326): a cell has four nodes, and each of its six edges one of five
operators. The network has three stages of cells with a residual block that halves the image between
them. Edges that feed nothing are built and run as in the published network, so that parameters and
multiply-accumulates are the published ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from espalier.errors import SpaceError
from espalier.nets.family import Family
from espalier.nets.graphs import Graphs, pruned
from espalier.nets.wired import Wire, Wired
from espalier.space import Candidate, Space, choice

OPERATORS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
EDGES = ((1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2))  # (to, from), a column each
SPACE = Space([choice(f"op_{to}_{origin}", *OPERATORS) for to, origin in EDGES])
VOCABULARY = ("", "input", *OPERATORS, "output")

_NONE, _NODES = OPERATORS.index("none"), 4


class NB201(Family):
    """The 15,625 networks of NAS-Bench-201 for images `(channels, height, width)`.

    Decisions `op_TO_FROM`: the operator on the edge between two nodes of the cell. `channels` are
    those of the first stage, `cells` the number in each of the three stages; the defaults are the
    benchmark's. Every build has fresh weights, batch norms with torch's eps and momentum as there.
    """

    name = "nb201"

    def __init__(
        self,
        shape: Sequence[int] = (3, 32, 32),
        classes: int = 10,
        channels: int = 16,
        cells: int = 5,
    ) -> None:
        if len(shape) != 3 or min((*shape, classes, channels, cells)) < 1:
            raise SpaceError(
                "nb201 takes an image's shape (channels, height, width), and classes, channels and "
                f"cells from 1, got {tuple(shape)}, {classes}, {channels} and {cells}"
            )
        self.shape, self.classes = tuple(int(n) for n in shape), int(classes)
        self.channels, self.cells = channels, cells

    @property
    def space(self) -> Space:
        """Six choices among five operators."""
        return SPACE

    def build(self, candidate: Candidate) -> nn.Module:
        """The network of a cell, `(b, channels, height, width)` to `(b, classes)`."""
        chosen = SPACE.candidate(candidate)
        net, width = Wired(), self.channels
        wire = net.chain("stem", _conv_norm(self.shape[0], width, 3), net.input)
        for stage in range(3):
            if stage:
                wire = _reduction(net, f"reduce{stage}", width, wire)
                width *= 2
            for index in range(self.cells):
                wire = _cell(net, f"stage{stage + 1}.{index}", chosen, width, wire)
        return net.network(net.chain("head", _head(width, self.classes), wire), "NB201")

    def graphs(self, codes: NDArray[Any], prune: bool = True) -> Graphs:
        """Cells as graphs with the operators as nodes: input, six operators, output.

        With `prune` an operator that no signal reaches, or from which none reaches the output, is
        padding; "none" always is one of these. `skip_connect` is an operator like others.
        """
        return graphs(codes, prune)


def graphs(codes: NDArray[Any], prune: bool = True) -> Graphs:
    """As `NB201.graphs`, for codes `(n, 6)`."""
    n, size = len(codes), len(EDGES)
    chosen = np.asarray(codes, dtype=np.int64)
    operators = np.zeros((n, size + 2), dtype=np.int64)
    operators[:, 0], operators[:, -1] = 1, len(VOCABULARY) - 1
    operators[:, 1:-1] = np.where((chosen == _NONE) & prune, 0, chosen + 2)
    adjacency = np.repeat(_WIRES[None], n, axis=0)
    if prune:
        operators, adjacency = pruned(operators, adjacency, 0, size + 1)
    return Graphs(operators, adjacency, VOCABULARY)


def _wires() -> NDArray[np.bool_]:
    """Which edges follow which: the input, the six edges, the output `(8, 8)`."""
    ends = [(0, None), *EDGES, (None, _NODES - 1)]  # what a node of the graph feeds and reads
    return np.array([[to is not None and to == origin for _, origin in ends] for to, _ in ends])


_WIRES = _wires()


def _cell(net: Wired, name: str, chosen: Candidate, width: int, wire: Wire) -> Wire:
    """Each node is the sum of its edges; one that no edge feeds is zero."""
    nodes = [wire]
    for to in range(1, _NODES):
        terms: list[Wire] = []
        for origin in range(to):
            operator = chosen[f"op_{to}_{origin}"]
            if operator == "none":
                continue
            layers = _operator(str(operator), width)
            terms.append(net.chain(f"{name}.op_{to}_{origin}", layers, nodes[origin]))
        nodes.append(net.add(terms) if terms else net.nothing(wire))
    return nodes[-1]


def _operator(name: str, width: int) -> Iterator[tuple[str, nn.Module]]:
    if name == "avg_pool_3x3":
        yield "pool", nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
    elif name != "skip_connect":
        yield from _relu_conv_norm(width, width, 3 if name == "nor_conv_3x3" else 1)


def _conv_norm(
    inputs: int, outputs: int, kernel: int, stride: int = 1
) -> Iterator[tuple[str, nn.Module]]:
    yield "conv", nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    yield "norm", nn.BatchNorm2d(outputs)


def _relu_conv_norm(
    inputs: int, outputs: int, kernel: int, stride: int = 1
) -> Iterator[tuple[str, nn.Module]]:
    yield "relu", nn.ReLU()
    yield from _conv_norm(inputs, outputs, kernel, stride)


def _reduction(net: Wired, name: str, width: int, wire: Wire) -> Wire:
    """The residual block between stages: twice the channels, half the size."""
    first = net.chain(f"{name}.first", _relu_conv_norm(width, 2 * width, 3, 2), wire)
    second = net.chain(f"{name}.second", _relu_conv_norm(2 * width, 2 * width, 3), first)
    # an odd side rounds up, as in the strided convolution
    pool = nn.AvgPool2d(2, stride=2, ceil_mode=True, count_include_pad=False)
    shortcut = [("pool", pool), ("conv", nn.Conv2d(width, 2 * width, 1, bias=False))]
    return net.add([net.chain(f"{name}.shortcut", shortcut, wire), second])


def _head(width: int, classes: int) -> Iterator[tuple[str, nn.Module]]:
    yield "norm", nn.BatchNorm2d(width)
    yield "relu", nn.ReLU()
    yield "pool", nn.AdaptiveAvgPool2d(1)
    yield "flatten", nn.Flatten()
    yield "linear", nn.Linear(width, classes)
