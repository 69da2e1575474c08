"""The pieces that a family's networks are made of, looked up for whole arrays of codes at once.

A family may offer `units()` and `unit(name, candidate)` (see `costs.UnitFamily`): then each unit is
looked up by the few columns of the codes that decide it. Without them each network is built once
and taken apart into its top-level children, or kept whole where these are no chain.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import BuiltinFunctionType
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from espalier.costs.chain import chain
from espalier.costs.cost import Builder
from espalier.costs.count import Count, counted
from espalier.costs.distinct import distinct
from espalier.costs.record import record
from espalier.costs.rows import unfolded
from espalier.costs.turn import Turn
from espalier.costs.work import features, fingerprint
from espalier.export import deployed
from espalier.space import Candidate

Codes = NDArray[Any]
Index = NDArray[np.int64]


class UnitLike(Protocol):
    """A named piece and the decisions that decide its module and its input's shape."""

    @property
    def name(self) -> str: ...

    @property
    def decisions(self) -> tuple[str, ...]: ...


@runtime_checkable
class UnitFamily(Protocol):
    """A family whose networks are chains of units, which can be had one by one.

    A unit's module may carry `beside_bytes`: the activations that stay alive while it runs, besides
    its own. A family may also have `outline(name, candidate)`: the same as `unit`, on torch's meta device
    where shapes are all that is asked for.
    """

    def units(self) -> Sequence[UnitLike]: ...

    def unit(self, name: str, candidate: Candidate) -> tuple[nn.Module, tuple[int, ...]] | None: ...


@dataclass(frozen=True)
class Piece:
    """One piece: its fingerprint, its counts, its work, and what is needed to make it again."""

    key: str
    count: Count
    work: tuple[float, ...]
    candidate: Candidate
    unit: str


@dataclass(frozen=True)
class Part:
    """One place in the network: distinct pieces, and which one each row has (-1: none)."""

    pieces: list[Piece]
    index: Index

    def values(self, of: NDArray[np.float64]) -> NDArray[np.float64]:
        """A value for each row from a value for each piece; 0 where there is none."""
        return np.append(of, 0.0)[self.index]


@dataclass(frozen=True)
class Terms:
    """A cost as a constant and a value for each piece, summed or, for a peak, the largest."""

    pieces: Pieces
    of: Callable[[Piece], float]
    constant: float = 0.0
    peak: bool = False


class Pieces:
    """All pieces of one family met so far. Shared by the costs of a family: use `pieces_of`.

    `survey` is how many random rows it takes, at a bearable price, to meet nearly all of them.
    """

    survey = 20_000

    def __init__(self, family: Builder) -> None:
        self.family = weakref.proxy(family)
        self.space = family.space

    def parts(self, codes: Codes) -> Iterator[Part]:
        """The parts of the networks of `codes` `(n, d)`; a network is the chain of its parts."""
        raise NotImplementedError

    def scopes(self) -> Mapping[str, tuple[str, ...]] | None:
        """For each part, in the order of `parts`, the decisions that decide it; None if unknown."""
        return None

    def make(self, piece: Piece) -> tuple[nn.Module, Tensor]:
        """The piece as a module, and a random input (batch 1)."""
        raise NotImplementedError

    def input(self, shape: Sequence[int], module: nn.Module) -> Tensor:
        """An input of batch 1 for a piece: random, or whole numbers for what reads no others."""
        leaves = (m for m in module.modules() if not any(m.children()))
        if isinstance(first := next(leaves, None), nn.Embedding):  # of words, positions or kinds
            return torch.arange(math.prod(shape)).remainder(first.num_embeddings).view(1, *shape)
        x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
        example: Tensor = self.family.example(1)
        alike = tuple(example.shape[1:]) == tuple(shape)
        if alike and not example.is_floating_point() and not _reads(module, x):
            return example
        return x

    def network(self, candidate: Candidate) -> nn.Module:
        """The whole network; torch's random generator is left as it was."""
        with unseeded():
            network: nn.Module = self.family.build(candidate)
            return network


def _reads(module: nn.Module, x: Tensor) -> bool:
    """Whether a module runs on an input."""
    try:
        with deployed(module), torch.no_grad():
            module(x)
    except Exception:  # whatever a module says of numbers that it does not read
        return False
    return True


_KNOWN: weakref.WeakKeyDictionary[Any, Pieces] = weakref.WeakKeyDictionary()


def pieces_of(family: Builder) -> Pieces:
    """The pieces of a family, made once for each family object."""
    try:
        if family not in _KNOWN:
            _KNOWN[family] = _made(family)
        return _KNOWN[family]
    except TypeError:  # a family that can't be a key: nothing is shared
        return _made(family)


def _made(family: Builder) -> Pieces:
    if isinstance(family, UnitFamily):
        units = _Units(family)
        if units.adds_up():
            return units
    return _Networks(family)


@contextmanager
def unseeded() -> Iterator[None]:
    """Weights made inside are always the same, and torch's generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # a hundred times faster than torch.manual_seed
        yield


def _piece(module: nn.Module, x: Tensor, candidate: Candidate, unit: str) -> Piece:
    module, x = unfolded(module, x)
    run = record(module, x)
    return Piece(fingerprint(run), counted(module, run), tuple(features(run)), candidate, unit)


def _beside(piece: Piece, module: nn.Module) -> Piece:
    """The piece with what stays alive beside it (a shortcut), where the family knows: see
    `UnitFamily`."""
    count, more = piece.count, int(getattr(module, "beside_bytes", 0))
    return replace(piece, count=replace(count, activation_bytes=count.activation_bytes + more))


_TOLD = {"conv", "linear", "batchnorm", "normalization", "activation", "pooling", "dropout"}
_TOLD |= {"container", "flatten"}


def _signature(module: nn.Module, x: Tensor) -> tuple[Any, ...] | None:
    """What decides the counts and work of torch's plain layers, chained or traced, without running
    them."""
    module, x = unfolded(module, x)
    if isinstance(module, Turn):
        return "turn", tuple(x.shape), x.dtype
    code = ""
    for part in module.modules():
        if isinstance(part, fx.GraphModule) and _plainly(part):
            code += part.code
            continue
        if type(part) is nn.Module:  # a name within a traced module
            continue
        room, _, file = type(part).__module__.rpartition(".")
        opaque = isinstance(part, (nn.MultiheadAttention, nn.ModuleList, nn.ModuleDict))
        if room != "torch.nn.modules" or file not in _TOLD or opaque or part._forward_hooks:
            return None
    state = {**module.state_dict(), **dict(module.named_buffers())}  # borrowed weights among them
    weights = tuple((name, tuple(p.shape)) for name, p in module.named_parameters())
    held = tuple((name, tuple(t.shape), t.dtype) for name, t in state.items())
    return code, repr(module), weights, held, tuple(x.shape), x.dtype


def _plainly(traced: fx.GraphModule) -> bool:
    """Whether code and layers tell all of a traced module: it calls functions of torch and Python
    alone, and holds no tensors beside its state."""
    if traced._forward_hooks:
        return False
    own = {*dict(traced.named_parameters()), *dict(traced.named_buffers())}
    for node in traced.graph.nodes:
        if node.op == "get_attr" and node.target not in own:
            return False
        called = node.op == "call_function" and not isinstance(node.target, BuiltinFunctionType)
        if called and not str(node.target.__module__).startswith("torch."):
            return False
    return True


class _Units(Pieces):
    """Pieces of a family with units."""

    def __init__(self, family: Any) -> None:
        super().__init__(family)
        self.units: list[UnitLike] = list(family.units())
        column = {name: j for j, name in enumerate(self.space.names)}
        self._columns = {u.name: [column[d] for d in u.decisions] for u in self.units}
        self._found: dict[tuple[Any, ...], Piece | None] = {}
        self._alike: dict[tuple[Any, ...], Piece] = {}
        self._runs: dict[tuple[Any, ...], bool] = {}
        self._gates = self._probed(self._suspects())

    def adds_up(self) -> bool:
        """Whether parts have the parameters of the whole network, on a few candidates.

        Where they don't, what decides which units run was not found among the likely decisions:
        all are tried then, before units are given up.
        """
        if self._sound():
            return True
        self._runs.clear()
        self._found.clear()
        self._gates = self._probed(list(range(len(self.space.names))))
        return self._sound()

    def _sound(self) -> bool:
        rows = self.space.sample(4, np.random.default_rng(0))
        rows = np.concatenate([self.space.corner(False), self.space.corner(True), rows])
        rows = rows[self.space.valid(rows)]
        total = np.zeros(len(rows))
        for part in self.parts(rows):
            total += part.values(np.array([p.count.params for p in part.pieces], dtype=float))
        for candidate, params in zip(self.space.decode(rows), total, strict=True):
            if sum(p.numel() for p in self.network(candidate).parameters()) != params:
                return False
        return True

    def _suspects(self) -> list[int]:
        """Columns that may decide whether a unit runs: conditions, and decisions of no unit."""
        parents = {name for d in self.space.decisions for name in d.when}
        claimed = {name for unit in self.units for name in unit.decisions}
        return [
            j for j, name in enumerate(self.space.names) if name in parents or name not in claimed
        ]

    def _probed(self, suspects: list[int]) -> dict[str, list[int]]:
        """For each unit the suspects that switch it on or off, found by changing each alone."""
        found: dict[str, set[int]] = {unit.name: set() for unit in self.units}
        for last in (False, True):
            start = self.space.repair(self.space.corner(last), np.random.default_rng(0))
            before = self._running(start)
            for j in suspects:
                for row in _options(self.space, start, j):
                    after = self._running(row)
                    for name in found:
                        if after[name] != before[name]:
                            found[name].add(j)
        return {name: sorted(columns) for name, columns in found.items()}

    def _running(self, row: Codes) -> dict[str, bool]:
        candidate = self.space.decode(row)[0]
        return {u.name: self._outline(u.name, candidate) is not None for u in self.units}

    def parts(self, codes: Codes) -> Iterator[Part]:
        codes = self.space.canonical(codes)
        for unit in self.units:
            rows = np.flatnonzero(self._runs_in(unit, codes))
            columns = self._columns[unit.name]
            first, inverse = distinct(codes[rows], columns)
            pieces: list[Piece] = []
            place = np.full(len(first), -1, dtype=np.int64)
            for i, piece in enumerate(self._look_up(unit, codes[rows[first]], columns)):
                if piece is not None:
                    place[i] = len(pieces)
                    pieces.append(piece)
            index = np.full(len(codes), -1, dtype=np.int64)
            index[rows] = place[inverse]
            yield Part(pieces, index)

    def scopes(self) -> Mapping[str, tuple[str, ...]]:
        names = self.space.names
        return {
            u.name: tuple(names[j] for j in sorted({*self._columns[u.name], *self._gates[u.name]}))
            for u in self.units
        }

    def _runs_in(self, unit: UnitLike, codes: Codes) -> NDArray[np.bool_]:
        columns = self._gates[unit.name]
        if not columns:
            return np.ones(len(codes), dtype=np.bool_)
        first, inverse = distinct(codes, columns)
        answers = np.zeros(len(first), dtype=np.bool_)
        for i, row in enumerate(first):
            key = (unit.name, *codes[row, columns].tolist())
            if key not in self._runs:
                candidate = self.space.decode(codes[row : row + 1])[0]
                self._runs[key] = self._outline(unit.name, candidate) is not None
            answers[i] = self._runs[key]
        return answers[inverse]

    def _look_up(self, unit: UnitLike, rows: Codes, columns: list[int]) -> list[Piece | None]:
        keys = [(unit.name, *row) for row in rows[:, columns].tolist()]
        new = [i for i, key in enumerate(keys) if key not in self._found]
        for i, candidate in zip(new, self.space.decode(rows[new]), strict=True):
            made = self._outline(unit.name, candidate)
            self._found[keys[i]] = made and self._piece(*made, candidate, unit.name)
        return [self._found[key] for key in keys]

    def _piece(
        self, module: nn.Module, shape: tuple[int, ...], candidate: Candidate, unit: str
    ) -> Piece:
        x = self._example_of(module, shape)
        signature = _signature(module, x)
        if signature is None:
            if x.is_meta:
                whole = self._unit(unit, candidate)
                assert whole is not None  # it is there without values
                module, x = whole[0], self.input(whole[1], whole[0])
            return _beside(_piece(module, x, candidate, unit), module)
        if signature not in self._alike:
            self._alike[signature] = _piece(module, x, candidate, unit)
        known = replace(self._alike[signature], candidate=candidate, unit=unit)
        return _beside(known, module)

    def _example_of(self, module: nn.Module, shape: tuple[int, ...]) -> Tensor:
        """An input of a piece, without values where the piece has none."""
        if any(t.is_meta for t in (*module.parameters(), *module.buffers())):
            return torch.empty(1, *shape, device="meta")
        return self.input(shape, module)

    def make(self, piece: Piece) -> tuple[nn.Module, Tensor]:
        made = self._unit(piece.unit, piece.candidate)
        assert made is not None  # it was there when the piece was met
        return made[0], self.input(made[1], made[0])

    def _outline(self, name: str, candidate: Candidate) -> tuple[nn.Module, tuple[int, ...]] | None:
        """A unit for what only asks for shapes, where the family has that: quick to get."""
        if not hasattr(self.family, "outline"):
            return self._unit(name, candidate)
        with unseeded():
            found: tuple[nn.Module, tuple[int, ...]] | None = self.family.outline(name, candidate)
            return found

    def _unit(self, name: str, candidate: Candidate) -> tuple[nn.Module, tuple[int, ...]] | None:
        with unseeded():
            found: tuple[nn.Module, tuple[int, ...]] | None = self.family.unit(name, candidate)
            return found


def _options(space: Any, row: Codes, column: int) -> list[Codes]:
    """The rows that differ from `row` in one column's option."""
    count = getattr(space.decisions[column], "count", 0)
    rows = []
    for code in range(count if space.decisions[column].kind != "real" else 0):
        if code != row[0, column]:
            other = row.copy()
            other[0, column] = code
            rows.append(space.canonical(other))
    return [row for row in rows if space.valid(row)[0]]


class _Networks(Pieces):
    """Pieces of a family that only builds whole networks."""

    survey = 40  # each is built and run

    def __init__(self, family: Any) -> None:
        super().__init__(family)
        self._found: dict[Any, list[Piece]] = {}

    def parts(self, codes: Codes) -> Iterator[Part]:
        codes = self.space.canonical(codes)
        first, inverse = distinct(codes, list(range(codes.shape[1])))
        chains = [self._chain(codes[row : row + 1]) for row in first]
        for place in range(max(map(len, chains), default=0)):
            pieces = [c[place] for c in chains if len(c) > place]
            held = np.array([len(c) > place for c in chains])
            position = np.where(held, np.cumsum(held) - 1, -1)
            yield Part(pieces, position[inverse])

    def _chain(self, row: Codes) -> list[Piece]:
        key = tuple(row[0].tolist())
        if key not in self._found:
            candidate = self.space.decode(row)[0]
            self._found[key] = [
                _piece(module, x, candidate, str(i))
                for i, (module, x) in enumerate(self._taken_apart(candidate))
            ]
        return self._found[key]

    def _taken_apart(self, candidate: Candidate) -> list[tuple[nn.Module, Tensor]]:
        network = self.network(candidate)
        return chain(network, self.input(self.family.example(1).shape[1:], network))

    def make(self, piece: Piece) -> tuple[nn.Module, Tensor]:
        return self._taken_apart(piece.candidate)[int(piece.unit)]
