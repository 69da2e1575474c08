"""NAS-Bench-201's cells with all operators on every edge, for `NB201Supernet`.

What runs is worked out once, from a candidate or a mixture, and all cells read it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.errors import SpaceError
from espalier.nets.elastic.core import Elastic, Maker
from espalier.nets.elastic.dims import Choices
from espalier.nets.elastic.mixing import Mixed, Weights, gated, resolve
from espalier.nets.fan import Fan, Running
from espalier.nets.nb201 import EDGES, OPERATORS, SPACE
from espalier.space import Decision

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
