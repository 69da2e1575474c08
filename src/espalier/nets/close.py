"""Cells whose edges own no weights: a gate assigns each to one of a few blocks that hold them.

Zhou et al., "CLOSE: Curriculum Learning On the Sharing Extent Towards Better One-shot NAS", 2022
(https://arxiv.org/abs/2207.07868). With one block every edge of a cell shares its operators with
every other, which learns fast and ranks coarsely; with more blocks edges that play other roles get
weights of their own. Here on the cells of NAS-Bench-201.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espalier.errors import SpaceError
from espalier.nets.close_gate import Assigned, Gate
from espalier.nets.elastic.core import Elastic, Maker, filled
from espalier.nets.elastic.dims import Choices
from espalier.nets.fan import counted, pooled
from espalier.nets.nb201 import EDGES, OPERATORS, SPACE, _conv_norm, _head
from espalier.nets.nb201_supernet import Reduction
from espalier.nets.supernet import Supernet
from espalier.nets.wired import Wire, Wired
from espalier.space import Decision

_NODES = 4
_KERNELS = {"nor_conv_1x1": 1, "nor_conv_3x3": 3}  # the operators that hold weights


class CLOSENet(Supernet):
    """A supernet over NAS-Bench-201's space with at most `blocks` sets of operators a cell.

    `channels` are those of the first stage, `cells` the number in each of three. `grow` adds a
    block; `extract` and `build` give the network that `NB201` builds. In training the gate's choice
    is drawn (Gumbel-softmax at `temperature`, straight through) from torch's generator, anew in each
    pass; in evaluation it is the likeliest block. Batch norms keep statistics of each edge, so that
    they are right for two edges with one block.
    """

    def __init__(
        self,
        shape: Sequence[int] = (3, 32, 32),
        classes: int = 10,
        channels: int = 16,
        cells: int = 5,
        blocks: int = 3,
        temperature: float = 5.0,
    ) -> None:
        super().__init__(shape, classes)
        for name, value in (("channels", channels), ("cells", cells), ("blocks", blocks)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise SpaceError(f"{name} of a CLOSENet is a whole number from 1, got {value!r}")
        if temperature <= 0:
            raise SpaceError(f"a temperature is above 0, got {temperature!r}")
        self.name = "close"
        self.gate = Gate(blocks, temperature)
        self.stem = nn.Sequential(OrderedDict(_conv_norm(self.shape[0], channels, 3)))
        for stage in range(1, 4):
            if stage > 1:
                self.add_module(f"reduce{stage - 1}", Reduction(channels))
                channels *= 2
            made = [_Cell(channels, blocks, self.gate) for _ in range(cells)]
            self.add_module(f"stage{stage}", nn.Sequential(*made))
        self.head = nn.Sequential(OrderedDict(_head(channels, self.classes)))

    @property
    def blocks(self) -> int:
        """How many blocks edges are assigned to now; 1 in the beginning."""
        return int(self.gate.grown)

    @property
    def most_blocks(self) -> int:
        """How many blocks it can have."""
        return self.gate.blocks

    def grow(self) -> None:
        """One more block, a copy of the last. Errors: `SpaceError` past the most."""
        now = self.blocks
        if now == self.gate.blocks:
            raise SpaceError(f"this CLOSENet has {now} blocks at most, and has them all")
        self.gate.grown += 1
        with torch.no_grad():
            for cell in self._cells():
                cell.blocks[now].load_state_dict(cell.blocks[now - 1].state_dict())

    def forward(self, x: Tensor) -> Tensor:
        drawn = isinstance(x, Tensor) and not x.is_meta  # nothing to draw while a graph is traced
        if drawn:
            assigned = self.gate.assign(self._cells()[0].chosen, self.training)
            for cell in self._cells():
                cell.assigned = assigned
        for name, child in self.named_children():
            if name != "gate":
                x = child(x)
        if drawn:
            for cell in self._cells():
                cell.assigned = None  # it holds the graph of this pass
        return x

    def _cells(self) -> list[_Cell]:
        return [m for stage in (1, 2, 3) for m in self.get_submodule(f"stage{stage}").children()]  # type: ignore[misc]


class _Glow(nn.Module):
    """One set of operators: a convolution and a batch norm's scale and shift for each kernel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.scale, self.shift = (nn.ParameterDict() for _ in range(3))
        for name, kernel in _KERNELS.items():
            self.weight[name] = nn.Conv2d(width, width, kernel, bias=False).weight
            self.scale[name] = nn.Parameter(torch.ones(width))
            self.shift[name] = nn.Parameter(torch.zeros(width))


class _Norm(nn.BatchNorm2d):
    """Statistics of one edge; scale and shift are its block's."""

    def __init__(self, width: int) -> None:
        super().__init__(width, affine=False)

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:  # type: ignore[override]
        rate = counted(self)
        return F.batch_norm(
            x, self.running_mean, self.running_var, scale, shift, self.training, rate, self.eps
        )


class _Cell(Elastic):
    """A cell over blocks of weights: `assigned` says which edge takes those of which."""

    def __init__(self, width: int, blocks: int, gate: Gate) -> None:
        super().__init__()
        self.width = width
        self._gate = [gate]  # in a list: it is the network's child, not this one's
        self.blocks = nn.ModuleList(_Glow(width) for _ in range(blocks))
        self.norms = nn.ModuleList(
            nn.ModuleDict({name: _Norm(width) for name in _KERNELS}) for _ in EDGES
        )
        self.chosen: list[str] = [OPERATORS[-1]] * len(EDGES)
        self.assigned: Assigned | None = None

    def decisions(self) -> tuple[Decision, ...]:
        return tuple(SPACE.decisions)

    def settle(self, choices: Choices) -> None:
        self.chosen = _named(choices)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_meta:
            return torch.empty_like(x)  # only the shape is wanted
        assigned = self.assigned
        blocks, weights = assigned or self._gate[0].assign(self.chosen, self.training)
        nodes, shared = [x], dict[tuple[object, ...], Tensor]()
        for to in range(1, _NODES):
            total: Tensor | None = None
            for edge, origin in _into(to):
                name = self.chosen[edge]
                if name == "none":
                    continue
                if name in _KERNELS:
                    out = self._convolved(edge, name, blocks[edge], origin, nodes[origin], shared)
                    out = out if weights is None else out * weights[edge].to(out.dtype)
                else:
                    out = _kept(name, origin, nodes[origin], shared)
                total = out if total is None else total + out
            nodes.append(torch.zeros_like(x) if total is None else total)
        return nodes[-1]

    def _convolved(
        self,
        edge: int,
        name: str,
        block: int,
        origin: int,
        x: Tensor,
        shared: dict[tuple[object, ...], Tensor],
    ) -> Tensor:
        """Edges that leave one node share its ReLU and, with one block, the convolution."""
        held = self.blocks[block]
        assert isinstance(held, _Glow)
        key = (name, origin, block)
        if key not in shared:
            before = ("relu", origin)
            if before not in shared:
                shared[before] = F.relu(x)
            padding = _KERNELS[name] // 2
            shared[key] = F.conv2d(shared[before], held.weight[name], padding=padding)
        norm = self.norms[edge].get_submodule(name)
        out: Tensor = norm(shared[key], held.scale[name], held.shift[name])
        return out

    def plain(self, make: Maker) -> nn.Module:
        """The cell as NB201 has it, with each edge's own copy of its block's weights."""
        chosen = _named(make.choices)
        blocks, _ = self._gate[0].assign(chosen, False)
        net = Wired()
        nodes: list[Wire] = [net.input]
        for to in range(1, _NODES):
            terms = [
                net.chain(
                    f"op_{to}_{origin}", self._layers(edge, chosen, blocks, make), nodes[origin]
                )
                for edge, origin in _into(to)
                if chosen[edge] != "none"
            ]
            nodes.append(net.add(terms) if terms else net.nothing(net.input))
        return net.network(nodes[-1], "Cell").train(self.training)

    def _layers(
        self, edge: int, chosen: list[str], blocks: list[int], make: Maker
    ) -> list[tuple[str, nn.Module]]:
        name, width = chosen[edge], self.width
        if name == "skip_connect":
            return []
        if name == "avg_pool_3x3":
            return [("pool", nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False))]
        held, kernel = self.blocks[blocks[edge]], _KERNELS[name]
        assert isinstance(held, _Glow)
        conv = nn.Conv2d(width, width, kernel, padding=kernel // 2, bias=False, device="meta")
        norm = nn.BatchNorm2d(width, device="meta")
        buffers = dict(self.norms[edge].get_submodule(name).named_buffers())
        own = {"weight": held.scale[name], "bias": held.shift[name], **buffers}
        return [
            ("relu", nn.ReLU()),
            ("conv", filled(conv, make, {"weight": held.weight[name]}, conv)),
            ("norm", filled(norm, make, own, norm)),
        ]


def _kept(name: str, origin: int, x: Tensor, shared: dict[tuple[object, ...], Tensor]) -> Tensor:
    """What an operator without weights gives."""
    if name == "skip_connect":
        return x
    key = (name, origin)
    if key not in shared:
        shared[key] = pooled(x)
    return shared[key]


def _named(choices: Choices) -> list[str]:
    return [str(choices[f"op_{to}_{origin}"]) for to, origin in EDGES]


def _into(to: int) -> list[tuple[int, int]]:
    """The edges into a node: which of the six, and from where."""
    return [(edge, origin) for edge, (end, origin) in enumerate(EDGES) if end == to]
