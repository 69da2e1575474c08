"""The space of DARTS: a normal and a reduction cell, and the supernet that holds all of them.

Liu, Simonyan & Yang, "DARTS: Differentiable Architecture Search", 2019
(https://arxiv.org/abs/1806.09055): a cell reads the two cells before it; each of its nodes adds up two
edges, an operator on each, and the cell's output is its nodes side by side. Reduction cells stand at
one third and two thirds of the depth. What differs: pools have a batch norm behind them in the final
network too, and there is neither an auxiliary head nor drop path.

`partial` is that of PC-DARTS (Xu et al., 2020, https://arxiv.org/abs/1907.05737).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from espalier.errors import SpaceError, unknown
from espalier.nets.elastic.containers import OneOf
from espalier.nets.elastic.core import Elastic, Maker, When
from espalier.nets.elastic.dims import Choices, options
from espalier.nets.elastic.mixing import Mixed, Mixture, Weights, along, no_gates, resolve
from espalier.nets.fan import pooled
from espalier.nets.plain import plain
from espalier.nets.supernet import Supernet
from espalier.nets.units import Unit, _does_nothing
from espalier.space import Decision, Option, choice

OPERATORS = (
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)
_STEM = 3  # the stem has so many times the channels of the first cell, as published


class Pool(Elastic):
    """3x3 averages of what is inside the image, without `AvgPool2d`'s slowness."""

    def decisions(self) -> tuple[Decision, ...]:
        return ()

    def forward(self, x: Tensor) -> Tensor:
        return pooled(x)

    def plain(self, make: Maker) -> nn.Module:
        return nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)


class HalfStep(nn.Module):
    """Half the size without losing a pixel: two strided 1x1 convolutions, one a pixel further."""

    def __init__(self, inputs: int, outputs: int, affine: bool) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.even = nn.Conv2d(inputs, outputs // 2, 1, stride=2, bias=False)
        self.odd = nn.Conv2d(inputs, outputs - outputs // 2, 1, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(outputs, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(x)
        further = F.pad(x, (0, 1, 0, 1))[:, :, 1:, 1:]
        out: Tensor = self.norm(torch.cat([self.even(x), self.odd(further)], 1))
        return out


def _point(inputs: int, outputs: int, affine: bool) -> nn.Sequential:
    """Relu, 1x1 convolution, norm."""
    conv = nn.Conv2d(inputs, outputs, 1, bias=False)
    return nn.Sequential(nn.ReLU(), conv, nn.BatchNorm2d(outputs, affine=affine))


def _separable(
    channels: int, kernel: int, stride: int, dilation: int, affine: bool
) -> list[nn.Module]:
    """Relu, depthwise and 1x1 convolution, norm."""
    padding = dilation * (kernel // 2)
    depthwise = nn.Conv2d(
        channels, channels, kernel, stride, padding, dilation, groups=channels, bias=False
    )
    return [nn.ReLU(), depthwise, *list(_point(channels, channels, affine))[1:]]


def _operator(name: str, channels: int, stride: int, affine: bool) -> nn.Module:
    if name == "skip_connect":
        return nn.Identity() if stride == 1 else HalfStep(channels, channels, affine)
    if name.endswith("pool_3x3"):
        pool: nn.Module = Pool()
        if name.startswith("max"):
            pool = nn.MaxPool2d(3, stride, padding=1)
        elif stride > 1:
            pool = nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)
        return nn.Sequential(pool, nn.BatchNorm2d(channels, affine=False))
    kernel = int(name[-1])
    if name.startswith("dil"):
        return nn.Sequential(*_separable(channels, kernel, stride, 2, affine))
    first = _separable(channels, kernel, stride, 1, affine)
    return nn.Sequential(*first, *_separable(channels, kernel, 1, 1, affine))


class PartialEdge(nn.Module):
    """An edge that changes one part in `partial` of the channels.

    The others pass times the sum of the edge's weights, through a max pool where the stride is 2;
    a channel shuffle follows.
    """

    def __init__(self, inner: OneOf, partial: int, stride: int) -> None:
        super().__init__()
        self.inner, self.partial = inner, partial
        self.rest = nn.Identity() if stride == 1 else nn.MaxPool2d(2, 2, ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        part = x.shape[1] // self.partial
        first = x[:, :part].contiguous(memory_format=torch.channels_last)
        rest, mixed = self.rest(x[:, part:]), self.inner._mixed
        if mixed is not None and not mixed.sure:
            rest = rest * along(mixed.weights.sum(-1), rest)
        return F.channel_shuffle(torch.cat([self.inner(first), rest], 1), self.partial)


class Node(Elastic):
    """The sum of the edges from two of the states; `states` is a list of tensors.

    A mixture weighs pairs, and an edge has the sum of the weights of the pairs that it is in.
    """

    def __init__(self, inputs: Decision | None, edges: Sequence[nn.Module]) -> None:
        super().__init__()
        self.inputs = inputs
        self.pairs = list(combinations(range(len(edges)), 2))
        for index, edge in enumerate(edges):
            self.add_module(str(index), edge)
        self._pair = self.pairs[-1]

    def decisions(self) -> tuple[Decision, ...]:
        return () if self.inputs is None else (self.inputs,)

    def branches(self) -> Iterator[tuple[nn.Module, When]]:
        for index, edge in enumerate(self.children()):
            if self.inputs is None:
                yield edge, {}
            else:
                names = tuple(_name(pair) for pair in self.pairs if index in pair)
                yield edge, {self.inputs.name: names}

    def _chosen(self, choices: Choices) -> tuple[int, int]:
        if self.inputs is None:
            return self.pairs[0]
        return self.pairs[options(self.inputs).index(choices[self.inputs.name])]

    def settle(self, choices: Choices) -> None:
        self._pair, self._mixed = self._chosen(choices), None

    def mix(self, weights: Mapping[str, Weights]) -> None:
        found = resolve(weights, self.decisions())
        no_gates(found.values(), found)
        for mixed in found.values():
            self._mixed = mixed

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        if self._mixed is not None:
            return self._mixture(states, self._mixed)
        one, other = self._pair
        out: Tensor = self._edge(one, states) + self._edge(other, states)
        return out

    def _edge(self, index: int, states: Sequence[Tensor]) -> Tensor:
        out: Tensor = self.get_submodule(str(index))(states[index])
        return out

    def _mixture(self, states: Sequence[Tensor], mixed: Mixed) -> Tensor:
        live = sorted({index for i in mixed.live for index in self.pairs[i]})
        total: Tensor | None = None
        for index in live:
            out = self._edge(index, states)
            if not mixed.sure:
                within = [i for i, pair in enumerate(self.pairs) if index in pair]
                out = out * along(mixed.weights[..., within].sum(-1), out)
            total = out if total is None else total + out
        assert total is not None
        return total

    def plain(self, make: Maker) -> nn.Module:
        pair = self._chosen(make.choices)
        edges = {index: make(self.get_submodule(str(index))) for index in pair}
        return _Pair(pair, edges)


class _Pair(nn.Module):
    """What is left of a node in a plain network; tracing takes the class away."""

    def __init__(self, pair: tuple[int, int], edges: Mapping[int, nn.Module]) -> None:
        super().__init__()
        self._pair = pair
        for index, edge in edges.items():
            self.add_module(str(index), edge)

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        one, other = self._pair
        out: Tensor = (
            self._modules[str(one)](states[one])  # type: ignore[misc]
            + self._modules[str(other)](states[other])  # type: ignore[misc]
        )
        return out


def _name(pair: tuple[int, int]) -> str:
    return f"{pair[0]}-{pair[1]}"


def _edges(kind: str, node: int) -> tuple[str, ...]:
    return tuple(f"{kind}.op_{node}_{origin}" for origin in range(node))


class Cell(nn.Module):
    """Two states in, the nodes side by side out."""

    def __init__(
        self,
        before: tuple[int, int],
        channels: int,
        nodes: int,
        reduces: bool,
        halve: bool,
        partial: int,
        affine: bool,
    ) -> None:
        super().__init__()
        self.before, self.channels, self.kind = before, channels, "reduce" if reduces else "normal"
        first = HalfStep if halve else _point  # the cell before the last has twice the size
        self.entry0: nn.Module = first(before[0], channels, affine)
        self.entry1: nn.Module = _point(before[1], channels, affine)
        self.strides = {origin: 2 if reduces and origin < 2 else 1 for origin in range(nodes + 1)}
        for node in range(2, nodes + 2):
            pairs = [_name(pair) for pair in combinations(range(node), 2)]
            inputs = choice(f"{self.kind}.node{node}.inputs", *pairs) if node > 2 else None
            edges: list[nn.Module] = []
            for origin, name in enumerate(_edges(self.kind, node)):
                stride = self.strides[origin]
                made: dict[Option, nn.Module] = {
                    option: _operator(option, channels // partial, stride, affine)
                    for option in OPERATORS
                }
                edge = OneOf(choice(name, *OPERATORS), made)
                edges.append(PartialEdge(edge, partial, stride) if partial > 1 else edge)
            self.add_module(f"node{node}", Node(inputs, edges))

    def forward(self, before: Tensor, last: Tensor) -> Tensor:
        states = [self.entry0(before), self.entry1(last)]
        for name, node in self._modules.items():
            if name.startswith("node"):
                assert node is not None
                states.append(node(states))
        return torch.cat(states[2:], 1)


class DARTSCells(Supernet):
    """The supernet of DARTS for images `(channels, height, width)`.

    Decisions: `normal.nodeN.inputs` the pair of states that node N reads (0 and 1 are the two cells
    before, node 2 always reads both), `normal.op_TO_FROM` the operator on an edge, active where the
    pair has it; the same of `reduce`. `channels` are those of a node in the first cell, doubled at each
    of the two reductions; a network of other size has the same candidates:
    `DARTSCells(cells=20, channels=36).build(candidate)`.

    A mixture that names operators of a node and not its inputs runs all edges, as DARTS does.
    """

    def __init__(
        self,
        shape: Sequence[int] = (3, 32, 32),
        classes: int = 10,
        channels: int = 16,
        cells: int = 8,
        nodes: int = 4,
        partial: int = 1,
        affine: bool = True,
    ) -> None:
        super().__init__(shape, classes)
        if min(channels, cells, nodes, partial) < 1 or channels % partial or cells < 3:
            raise SpaceError(
                "darts takes channels, nodes and partial from 1, cells from 3 (one third each), and"
                f" partial a divisor of channels, got {channels}, {nodes}, {partial} and {cells} cells"
            )
        self.partial, self.nodes = partial, nodes
        self.joins = {
            f"{kind}.{node}": _edges(kind, node)
            for kind in ("normal", "reduce")
            for node in range(2, nodes + 2)
        }
        width = _STEM * channels
        stem = nn.Conv2d(self.shape[0], width, 3, padding=1, bias=False)
        self.stem = nn.Sequential(stem, nn.BatchNorm2d(width))
        before, halved = (width, width), False
        self.cells = nn.ModuleList()
        for index in range(cells):
            reduces = index in (cells // 3, 2 * cells // 3)
            channels *= 2 if reduces else 1
            self.cells.append(Cell(before, channels, nodes, reduces, halved, partial, affine))
            before, halved = (before[1], nodes * channels), reduces
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before[1], self.classes)
        )
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        before = last = self.stem(x)
        for cell in self.cells:
            before, last = last, cell(before, last)
        out: Tensor = self.head(last)
        return out

    def mix(self, weights: Mixture) -> None:
        """As `Supernet.mix`; a node whose operators are mixed and whose inputs are not runs all."""
        super().mix({**self._all_edges(weights), **weights})

    def _all_edges(self, weights: Mixture) -> dict[str, Tensor]:
        """Weights of pairs by which every edge counts once."""
        out: dict[str, Tensor] = {}
        like = next(iter(self.parameters()))
        for join, names in self.joins.items():
            kind, node = join.split(".")
            decision = f"{kind}.node{node}.inputs"
            if decision in self.space and any(name in weights for name in names):
                pairs = len(options(self.space[decision]))
                out[decision] = like.new_full((pairs,), 1 / (int(node) - 1))
        return out

    def _plain(self, candidate: Mapping[str, Option], fresh: bool) -> fx.GraphModule:
        self._refuse_partial()
        return super()._plain(candidate, fresh)

    def _refuse_partial(self) -> None:
        if self.partial > 1:
            raise SpaceError(
                f"the operators of this supernet have 1/{self.partial} of a network's channels:"
                " build candidates with DARTSCells(partial=1) and train them"
            )

    def units(self) -> list[Unit]:
        """The stem, the entries and edges of every cell, and the head."""
        out = [Unit("stem", ())]
        for index, cell in enumerate(self.cells):
            assert isinstance(cell, Cell)
            out += [Unit(f"cells.{index}.{entry}", ()) for entry in ("entry0", "entry1")]
            for node in range(2, self.nodes + 2):
                inputs = (f"{cell.kind}.node{node}.inputs",) if node > 2 else ()
                for origin, name in enumerate(_edges(cell.kind, node)):
                    place = f"cells.{index}.node{node}.{origin}"
                    out.append(Unit(place, (*inputs, name)))
        return [*out, Unit("head", ())]

    def unit(
        self, name: str, candidate: Mapping[str, Option]
    ) -> tuple[nn.Module, tuple[int, ...]] | None:
        """One piece as a plain module and the shape of its input; None where it does nothing."""
        chosen, units = self._checked(candidate), {unit.name: unit for unit in self.units()}
        self._refuse_partial()
        if name not in units:
            raise SpaceError(unknown("unit", name, units))
        if any(edge not in chosen for edge in units[name].decisions):
            return None
        module = plain(self.get_submodule(name), chosen)
        return None if _does_nothing(module) else (module, self._input(name))

    def _input(self, name: str) -> tuple[int, ...]:
        """The shape that a piece reads; an odd side rounds up when it is halved."""
        if name == "stem":
            return self.shape
        place, *rest = name.split(".")
        index = len(self.cells) if place == "head" else int(rest[0])
        kinds = ["", "", *(cell.kind for cell in self.cells)]  # two states of the stem's size
        after = index + 2  # halved by those before
        cell = self.cells[min(index, len(self.cells) - 1)]
        assert isinstance(cell, Cell)
        if place == "head":
            last = cell.channels * self.nodes
            return (last, *self._side(kinds[:after].count("reduce")))
        now = kinds[:after].count("reduce")
        if rest[1] == "entry0":
            return (cell.before[0], *self._side(kinds[: after - 1].count("reduce")))
        if rest[1] == "entry1":
            return (cell.before[1], *self._side(now))
        inside = cell.kind == "reduce" and int(rest[2]) > 1  # a node of the cell itself
        return (cell.channels, *self._side(now + inside))

    def _side(self, halved: int) -> tuple[int, int]:
        height, width = (-(-side // 2**halved) for side in self.shape[1:])
        return height, width
