"""The additive pieces of a supernet, for tables of costs: what they are, and what changes them.

Shapes are found on a shadow: a copy of the supernet on the meta device, where each piece is
replaced by a probe that notes the shape of its input and runs the piece once for each new shape.
So a further candidate costs microseconds a piece.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from espalier.errors import SpaceError, unknown
from espalier.nets.collect import layers, settle
from espalier.nets.elastic.containers import Repeat
from espalier.nets.elastic.dims import Choices
from espalier.nets.plain import plain
from espalier.space import Candidate, Real

if TYPE_CHECKING:
    from espalier.nets.supernet import Supernet

Shape = tuple[int, ...]
WHOLE = "network"


@dataclass(frozen=True)
class Unit:
    """One piece. Its plain module and its input's shape hang on `decisions` alone."""

    name: str
    decisions: tuple[str, ...]


def pieces(root: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Children of the root by path; the blocks of a `Repeat`, also of one within a Sequential."""
    for name, child in root._modules.items():  # a module with two names comes twice: see _divides
        if child is None:
            continue
        path = f"{prefix}{name}"
        repeats = isinstance(child, Repeat) or (
            type(child) is nn.Sequential and any(isinstance(m, Repeat) for m in child.modules())
        )
        if repeats:
            yield from pieces(child, f"{path}.")
        else:
            yield path, child


class _NotAChain(Exception):
    """A piece that was not called once with one tensor."""


class _Probe(nn.Module):
    """Stands for a piece on the shadow: notes the input's shape, and remembers the output's."""

    def __init__(self, name: str, piece: nn.Module, shadow: _Shadow) -> None:
        super().__init__()
        self._name, self._shadow = name, shadow
        self._own = tuple(sorted({n for _, names in layers(piece) for n in names}))
        self._piece = [_lighter(piece)]  # in a list, so that it is no child
        self._layers = layers(self._piece[0])
        self._outputs: dict[tuple[Any, ...], Shape] = {}

    @property
    def own(self) -> tuple[str, ...]:
        """The decisions that act inside the piece."""
        return self._own

    def forward(self, *args: Any, **named: Any) -> Tensor:
        if len(args) != 1 or named or not isinstance(args[0], Tensor):
            raise _NotAChain(self._name)
        x: Tensor = args[0]
        if self._name in self._shadow.seen:
            raise _NotAChain(self._name)
        self._shadow.seen[self._name] = tuple(x.shape[1:])
        choices = self._shadow.choices
        key = (tuple(x.shape), tuple(choices.get(name) for name in self._own))
        if key not in self._outputs:
            settle(self._layers, choices)
            self._outputs[key] = tuple(self._piece[0](x).shape)
        return x.new_empty(self._outputs[key])


class _Shadow:
    """A supernet without weights that finds the input shapes of the pieces."""

    def __init__(self, supernet: Supernet) -> None:
        memo: dict[int, Any] = {}
        for tensor in [*supernet.parameters(), *supernet.buffers()]:
            memo[id(tensor)] = _meta(tensor)
        self.root: Supernet = copy.deepcopy(supernet, memo).eval()
        self.seen: dict[str, Shape] = {}
        self.choices: Choices = {}
        self.probes: dict[str, _Probe] = {}
        for name, piece in list(pieces(self.root)):
            probe = _Probe(name, piece, self)
            parent, _, last = name.rpartition(".")
            self.root.get_submodule(parent)._modules[last] = probe
            self.probes[name] = probe.eval()
        self._outer = layers(self.root)

    @torch.no_grad()
    def shapes(self, choices: Choices) -> dict[str, Shape]:
        """Input shapes of the pieces that `choices` runs."""
        self.seen, self.choices = {}, choices
        settle(self._outer, choices)
        self.root(torch.empty(1, *self.root.shape, device="meta"))
        return self.seen


def _lighter(piece: nn.Module) -> nn.Module:
    """Takes norms out: they keep shapes, and on the meta device torch is slow at them."""
    norms = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
    for module in list(piece.modules()):
        for name, child in module.named_children():
            if isinstance(child, norms):
                module._modules[name] = nn.Identity()
    return nn.Identity() if isinstance(piece, norms) else piece


def _meta(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty


class Units:
    """The pieces of one supernet, and how to get each alone."""

    def __init__(self, supernet: Supernet) -> None:
        self._supernet = supernet
        self._shapes: dict[Candidate, dict[str, Shape]] = {}
        self._shadow: _Shadow | None = _Shadow(supernet) if _divides(supernet) else None
        self._units = self._found()

    def units(self) -> tuple[Unit, ...]:
        """The pieces, in the order of the network."""
        return self._units

    def unit(self, name: str, candidate: Candidate) -> tuple[nn.Module, Shape] | None:
        """A piece as a plain module, and its input's shape; None where nothing of it runs."""
        if name not in {unit.name for unit in self._units}:
            raise SpaceError(unknown("unit", name, (unit.name for unit in self._units)))
        if self._shadow is None:
            return plain(self._supernet, candidate), self._supernet.shape
        shape = self._inputs(candidate).get(name)
        if shape is None:
            return None
        module = plain(self._supernet.get_submodule(name), candidate)
        return None if _does_nothing(module) else (module, shape)

    def _inputs(self, candidate: Candidate) -> dict[str, Shape]:
        assert self._shadow is not None
        if candidate not in self._shapes:
            if len(self._shapes) >= 4096:
                self._shapes.clear()
            self._shapes[candidate] = self._shadow.shapes(candidate)
        return self._shapes[candidate]

    def _found(self) -> tuple[Unit, ...]:
        space = self._supernet.space
        whole = (Unit(WHOLE, tuple(space.names)),)
        if self._shadow is None:
            return whole
        try:
            reach = self._reach()
        except Exception:  # whatever a user's forward does on the meta device: one piece is right
            self._shadow = None
            return whole
        order = {name: i for i, name in enumerate(space.names)}
        return tuple(
            Unit(name, tuple(sorted({*probe.own, *reach[name]}, key=order.__getitem__)))
            for name, probe in self._shadow.probes.items()
        )

    def _reach(self) -> dict[str, set[str]]:
        """For each piece the decisions that change its input's shape, found by changing each.

        Each is changed alone, from the smallest, the largest and two random candidates.
        """
        space = self._supernet.space
        assert self._shadow is not None
        reach: dict[str, set[str]] = {name: set() for name in self._shadow.probes}
        starts = np.concatenate(
            [space.corner(False), space.corner(True), space.sample(2, np.random.default_rng(0))]
        )
        for start in starts:
            base = self._inputs(space.decode(start[None])[0])
            for decision, other in self._changes(start):
                for name, shape in self._inputs(other).items():
                    if name in base and base[name] != shape:
                        reach[name].add(decision)
        return reach

    def _changes(self, row: np.ndarray[Any, Any]) -> Iterable[tuple[str, Candidate]]:
        space = self._supernet.space
        active = space.active(row[None])[0]
        for column, decision in enumerate(space.decisions):
            if not active[column]:
                continue
            ends = [decision.low, decision.high] if isinstance(decision, Real) else []
            values = ends or list(range(decision.count))
            codes = np.repeat(row[None], len(values), axis=0)
            codes[:, column] = values
            for candidate in space.decode(space.canonical(codes)):
                yield decision.name, candidate


def _divides(supernet: nn.Module) -> bool:
    """Whether the pieces hold each parameter of the supernet exactly once."""
    held = [id(p) for _, piece in pieces(supernet) for p in piece.parameters()]
    return sorted(held) == sorted(id(p) for p in supernet.parameters())


def _does_nothing(module: nn.Module) -> bool:
    """A module that is an identity, or a traced one of nothing but identities."""
    if isinstance(module, torch.fx.GraphModule):
        return all(node.op in ("placeholder", "output") for node in module.graph.nodes)
    if type(module) is nn.Sequential:
        return all(_does_nothing(child) for child in module)
    return isinstance(module, nn.Identity)
