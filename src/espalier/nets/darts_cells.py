"""The space of DARTS: a normal and a reduction cell, and the supernet that holds all of them.

Liu, Simonyan & Yang, "DARTS: Differentiable Architecture Search", 2019
(https://arxiv.org/abs/1806.09055): a cell reads the two cells before it; each of its nodes adds up two
edges, an operator on each, and the cell's output is its nodes side by side. Reduction cells stand at
one third and two thirds of the depth. What differs: pools have a batch norm behind them in the final
network too, and there is neither an auxiliary head nor drop path.

`partial` is that of PC-DARTS (Xu et al., 2020, https://arxiv.org/abs/1907.05737).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor, fx, nn

from espalier.errors import SpaceError, unknown
from espalier.nets.darts_nodes import (
    OPERATORS,
    HalfStep,
    Node,
    PartialEdge,
    operator,
    pair_name,
    point,
)
from espalier.nets.elastic.containers import OneOf
from espalier.nets.elastic.dims import options
from espalier.nets.elastic.mixing import Mixture
from espalier.nets.plain import plain
from espalier.nets.supernet import Supernet
from espalier.nets.units import Unit, _does_nothing
from espalier.space import Option, choice

_STEM = 3  # the stem has so many times the channels of the first cell, as published


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
        first = HalfStep if halve else point  # the cell before the last has twice the size
        self.entry0: nn.Module = first(before[0], channels, affine)
        self.entry1: nn.Module = point(before[1], channels, affine)
        self.strides = {origin: 2 if reduces and origin < 2 else 1 for origin in range(nodes + 1)}
        for node in range(2, nodes + 2):
            pairs = [pair_name(pair) for pair in combinations(range(node), 2)]
            inputs = choice(f"{self.kind}.node{node}.inputs", *pairs) if node > 2 else None
            edges: list[nn.Module] = []
            for origin, name in enumerate(_edges(self.kind, node)):
                stride = self.strides[origin]
                made: dict[Option, nn.Module] = {
                    option: operator(option, channels // partial, stride, affine)
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
