"""The supernet of NAS-Bench-201's cells: shared weights for all 15,625 networks of `NB201`.

Every operator of every edge has weights of its own; all cells take one candidate, or one mixture. An
edge that feeds nothing under it is not run. `partial` mixes only some of the channels, as PC-DARTS
does (Xu et al., "PC-DARTS: Partial Channel Connections for Memory-Efficient Architecture Search",
2020, https://arxiv.org/abs/1907.05737).
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from espalier.errors import SpaceError, unknown
from espalier.nets.elastic.core import Elastic, Maker
from espalier.nets.elastic.dims import Choices
from espalier.nets.elastic.mixing import Mixed, Weights, gated, resolve
from espalier.nets.fan import Fan, Running
from espalier.nets.nb201 import EDGES, NB201, OPERATORS, SPACE, _conv_norm, _head, _operator
from espalier.nets.nb201 import _relu_conv_norm as _block
from espalier.nets.plain import plain
from espalier.nets.supernet import Supernet
from espalier.nets.units import Unit
from espalier.space import Decision, Option

_NODES = 4
_OUTPUT = _NODES - 1


@dataclass(frozen=True)
class Plan:
    """What the cells run. Edges are grouped by the node that they leave."""

    running: tuple[Running, ...]  # options that run, none where an edge feeds nothing
    weights: tuple[Tensor | None, ...]  # as `Fan` takes them
    idle: Mapping[tuple[int, int], Mixed]  # gates, by (to, from)


class Wiring(Elastic):
    """Holds the decisions and what they say, once for all cells.

    `passing`: edges also pass on channels that their operators do not see; these take no gates.
    """

    def __init__(self, passing: bool = False) -> None:
        super().__init__()
        self._passing = passing
        self._own = _plan({name: _sure(len(OPERATORS) - 1) for name in SPACE.names}, passing)

    @property
    def plan(self) -> Plan:
        """What cells run now."""
        return self._mixed or self._own

    def decisions(self) -> tuple[Decision, ...]:
        return tuple(SPACE.decisions)

    def settle(self, choices: Choices) -> None:
        self._settled = {name: choices[name] for name in SPACE.names}
        self._mixed = None
        self._own = _plan(self._settled_ways(), self._passing)

    def _settled_ways(self) -> dict[str, Mixed]:
        chosen = self._choices()
        return {name: _sure(OPERATORS.index(str(chosen[name]))) for name in SPACE.names}

    def mix(self, weights: Mapping[str, Weights]) -> None:
        found = resolve(weights, self.decisions())
        if self._passing and any(mixed.idle for mixed in found.values()):
            raise SpaceError("gates are not for partial channels: give tensors of weights")
        self._mixed = _plan({**self._settled_ways(), **found}, self._passing)

    def plain(self, make: Maker) -> nn.Module:
        return nn.Identity()


def _sure(index: int) -> Mixed:
    return Mixed(torch.eye(len(OPERATORS))[index], (index,), sure=True)


def _plan(found: Mapping[str, Mixed], passing: bool) -> Plan:
    edges = {(to, origin): found[f"op_{to}_{origin}"] for to, origin in EDGES}
    read = {_OUTPUT}  # the nodes whose value reaches the output, or gates in backward
    for to, origin in reversed(EDGES):
        edge = edges[to, origin]
        if to in read and (passing or any((*edge.live, *edge.idle))):  # 0 is "none"
            read.add(origin)
    running, weights = [], []
    for origin in range(_OUTPUT):
        leaving = [(to, edges[to, origin]) for to in range(origin + 1, _NODES)]
        running.append([_live(edge) if to in read else () for to, edge in leaving])
        weights.append(_stacked([edge for _, edge in leaving]))
    idle = {e: m for e, m in edges.items() if m.idle and e[0] in read}
    return Plan(tuple(running), tuple(weights), idle)


def _live(edge: Mixed) -> tuple[int, ...]:
    return tuple(i for i in edge.live if i)


def _stacked(edges: Sequence[Mixed]) -> Tensor | None:
    """Weights `(edges, options)` or `(edges, batch, options)`; None where all are sure."""
    unsure = [e.weights for e in edges if not e.sure]
    if not unsure:
        return None
    rows = [e.weights.to(unsure[0]) for e in edges]
    batch = max(w.shape[0] if w.dim() == 2 else 0 for w in rows)
    if batch:
        rows = [w if w.dim() == 2 else w.expand(batch, -1) for w in rows]
    return torch.stack(rows)


class Cell(nn.Module):
    """Each node is the sum of its edges; one that no edge feeds is zero."""

    def __init__(self, channels: int, partial: int, affine: bool, wiring: Wiring) -> None:
        super().__init__()
        self.partial, self._wiring = partial, (wiring,)  # not a child: all cells share it
        fans = [Fan(_OUTPUT - i, channels // partial, affine) for i in range(_OUTPUT)]
        self.fans = nn.ModuleList(fans)

    def forward(self, x: Tensor) -> Tensor:
        plan = self._wiring[0].plan
        found: list[list[Tensor]] = [[] for _ in range(_NODES)]
        gates = plan.idle if torch.is_grad_enabled() else {}
        for origin, (fan, running) in enumerate(zip(self.fans, plan.running, strict=True)):
            if not any(running) and all(origin != edge[1] for edge in gates):
                continue
            value = x if not origin else _sum(found[origin], x)
            for offset, out in enumerate(fan(value, running, plan.weights[origin])):
                edge = (origin + 1 + offset, origin)
                if edge in gates:
                    out = _gate(out, value, plan.idle[edge], fan, offset)
                if out is not None:
                    found[edge[0]].append(out)
            found[origin] = []  # freed where backward does not need it
        return _sum(found[_OUTPUT], x)


def _gate(out: Tensor | None, x: Tensor, mixed: Mixed, fan: nn.Module, place: int) -> Tensor:
    """Lets backward find the gradients of options that did not run."""
    assert isinstance(fan, Fan)
    out = torch.zeros_like(x) if out is None else out.clone()  # gated() changes it
    runs = {i: _Alone(fan, place, i) for i in mixed.idle}
    return gated(out, mixed.weights, x, runs)


class _Alone(nn.Module):
    """One operator of one edge of a fan."""

    def __init__(self, fan: Fan, place: int, option: int) -> None:
        super().__init__()
        self._fan, self._option = (fan,), option
        self._running = [(option,) if e == place and option else () for e in range(fan.edges)]

    def forward(self, x: Tensor) -> Tensor:
        return _sum([out for out in self._fan[0](x, self._running) if out is not None], x)


def _sum(terms: Sequence[Tensor], like: Tensor) -> Tensor:
    if not terms:
        return torch.zeros_like(like)
    if len(terms) == 1:
        return terms[0]
    out = terms[0] + terms[1]
    for term in terms[2:]:
        out.add_(term)
    return out


class PartialCell(Cell):
    """A cell that mixes the first of `partial` parts of the channels.

    The others pass an edge times the sum of its weights. Each node ends with a channel shuffle.
    """

    def forward(self, x: Tensor) -> Tensor:
        plan = self._wiring[0].plan
        nodes, part = [x], x.shape[1] // self.partial
        mixed: list[list[Tensor]] = [[] for _ in range(_NODES)]
        passed: list[list[Tensor]] = [[] for _ in range(_NODES)]
        for origin, (fan, running) in enumerate(zip(self.fans, plan.running, strict=True)):
            value = nodes[origin]
            first = value[:, :part].contiguous(memory_format=torch.channels_last)
            rest, weights = value[:, part:], plan.weights[origin]
            for offset, out in enumerate(fan(first, running, weights)):
                to = origin + 1 + offset
                if out is not None:
                    mixed[to].append(out)
                passed[to].append(rest if weights is None else _times(rest, weights[offset]))
            node = origin + 1
            both = [_sum(mixed[node], first), _sum(passed[node], rest)]
            nodes.append(F.channel_shuffle(torch.cat(both, 1), self.partial))
        return nodes[-1]


def _times(x: Tensor, weights: Tensor) -> Tensor:
    return x * weights.sum(-1).reshape(-1, 1, 1, 1).to(x.dtype)


class Reduction(nn.Module):
    """The residual block between stages: twice the channels, half the size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Sequential(OrderedDict(_block(width, 2 * width, 3, 2)))
        self.second = nn.Sequential(OrderedDict(_block(2 * width, 2 * width, 3)))
        pool = nn.AvgPool2d(2, stride=2, ceil_mode=True, count_include_pad=False)
        conv = nn.Conv2d(width, 2 * width, 1, bias=False)
        self.shortcut = nn.Sequential(OrderedDict(pool=pool, conv=conv))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.shortcut(x) + self.second(self.first(x))
        return out


class NB201Supernet(Supernet):
    """The supernet of `NB201`, with its decisions and sizes; `extract` and `build` give its networks.

    `partial=K` mixes one K-th of the channels of an edge. With `affine=False` the norms of the cells
    have no parameters, as DARTS searches; what is extracted has ones and zeros there.
    """

    joins = MappingProxyType(
        {
            str(node): tuple(f"op_{to}_{origin}" for to, origin in EDGES if to == node)
            for node in range(1, _NODES)
        }
    )

    def __init__(
        self,
        shape: Sequence[int] = (3, 32, 32),
        classes: int = 10,
        channels: int = 16,
        cells: int = 5,
        partial: int = 1,
        affine: bool = True,
    ) -> None:
        super().__init__(shape, classes)
        if min(channels, cells, partial) < 1 or channels % partial:
            raise SpaceError(
                "nb201-supernet takes channels and cells from 1, and partial a divisor of channels, "
                f"got {channels}, {cells} and {partial}"
            )
        self.channels, self.cells, self.partial = channels, cells, partial
        self.wiring = Wiring(passing=partial > 1)
        kind = Cell if partial == 1 else PartialCell
        self.stem = nn.Sequential(OrderedDict(_conv_norm(self.shape[0], channels, 3)))
        for stage in range(3):
            width = channels * 2**stage
            if stage:
                self.add_module(f"reduce{stage}", Reduction(width // 2))
            made = [kind(width, partial, affine, self.wiring) for _ in range(cells)]
            self.add_module(f"stage{stage + 1}", nn.Sequential(*made))
        self.head = nn.Sequential(OrderedDict(_head(4 * channels, self.classes)))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        for name, child in self.named_children():
            if name != "wiring":
                x = child(x)
        return x

    def _plain(self, candidate: Mapping[str, Option], fresh: bool) -> fx.GraphModule:
        chosen = self._checked(candidate)
        self._refuse_partial()
        family = NB201(self.shape, self.classes, self.channels, self.cells)
        if fresh:
            network = family.build(chosen).to(next(self.parameters()).device)
        else:
            with torch.device("meta"):  # copying must not draw from the random generator
                network = family.build(chosen)
            _fill(network, lambda name: self._tensor(name, chosen))
        assert isinstance(network, fx.GraphModule)
        return network.train(self.training)

    def _refuse_partial(self) -> None:
        if self.partial > 1:
            raise SpaceError(
                f"the operators of this supernet have 1/{self.partial} of a network's channels: "
                'build candidates with the family "nb201" and train them'
            )

    def _tensor(self, name: str, chosen: Mapping[str, Option]) -> Tensor:
        """What a parameter or buffer of `NB201`'s network is here."""
        places = name.split(".")
        if not places[0].startswith("stage"):
            own: Any = self.get_submodule(name.rpartition(".")[0])
            found: Tensor = getattr(own, places[-1])
            return found
        stage, index, edge, *rest = places
        to, origin = (int(n) for n in edge.split("_")[1:])
        cell = self.get_submodule(f"{stage}.{index}")
        assert isinstance(cell, Cell)
        fan = cell.fans[origin]
        assert isinstance(fan, Fan)
        return fan.tensor(to - origin - 1, str(chosen[edge]), *rest)

    def units(self) -> list[Unit]:
        """The stem, every edge of every cell, the blocks between stages, and the head."""
        out = [Unit("stem", ())]
        for stage in range(1, 4):
            if stage > 1:
                out.append(Unit(f"reduce{stage - 1}", ()))
            for index in range(self.cells):
                out += [Unit(f"stage{stage}.{index}.{name}", (name,)) for name in SPACE.names]
        return [*out, Unit("head", ())]

    def unit(
        self, name: str, candidate: Mapping[str, Option]
    ) -> tuple[nn.Module, tuple[int, ...]] | None:
        """One piece as a plain module and the shape of its input; None for "none" and the like."""
        chosen, names = self._checked(candidate), [unit.name for unit in self.units()]
        self._refuse_partial()
        if name not in names:
            raise SpaceError(unknown("unit", name, names))
        place, _, edge = name.partition(".")
        if place == "stem":
            return copy.deepcopy(self.stem), self.shape
        if place == "head":
            return copy.deepcopy(self.head), self._size(2)
        if place.startswith("reduce"):
            return plain(self.get_submodule(name), chosen), self._size(int(place[-1]) - 1)
        stage, edge = int(place[-1]) - 1, edge.partition(".")[2]
        if chosen[edge] in ("none", "skip_connect"):
            return None
        with torch.device("meta"):
            layers = OrderedDict(_operator(str(chosen[edge]), self.channels * 2**stage))
        module = nn.Sequential(layers)
        _fill(module, lambda rest: self._tensor(f"{name}.{rest}", chosen))
        return module.train(self.training), self._size(stage)

    def _size(self, stage: int) -> tuple[int, ...]:
        """The shape of the images in a stage; an odd side rounds up when it is halved."""
        sides = (-(-side // 2**stage) for side in self.shape[1:])
        return (self.channels * 2**stage, *sides)


def _fill(network: nn.Module, source: Any) -> None:
    """Gives a network of the meta device copies of the tensors that `source(name)` names."""
    found = {name: source(name) for name in network.state_dict()}
    copies = {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in found.items()
    }
    network.load_state_dict(copies, strict=True, assign=True)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(found[name].requires_grad)
