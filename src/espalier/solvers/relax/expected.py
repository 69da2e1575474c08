"""What a network costs on average, when each of its decisions is drawn with some probability.

An additive cost (parameters, multiply-accumulates, the latency of a table of pieces) is a sum over
units, and a unit's cost hangs on few decisions. So its mean over independent draws is exact: the
table of the unit's costs, contracted with the probabilities of each decision. It is differentiable
in them, which is what FBNet (Wu et al., 2019) and ProxylessNAS (Cai et al., 2019) learn from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from espalier.costs import Count, PredictedLatency, count
from espalier.costs.filler import Filler
from espalier.costs.record import record
from espalier.costs.work import features, fingerprint
from espalier.errors import SpaceError, unknown
from espalier.nets import Supernet
from espalier.space import Candidate, Option, Real

Price = Callable[[nn.Module, tuple[int, ...]], float]
MOST = 100_000  # combinations of a unit's options that are priced


class Expected:
    """The mean cost `()` of a network whose decisions are drawn independently.

    Call it with `{decision: probabilities (options,)}`; `names` are those that it wants. Weights
    that are no probabilities are taken as they are: the cost is linear in each of them. Decisions
    drawn only under a condition count as often as the condition holds.
    Errors: `SpaceError` where one is missing or has another number of options.
    """

    def __init__(
        self,
        names: Sequence[str],
        options: Mapping[str, tuple[Option, ...]],
        tables: Mapping[tuple[str, ...], Tensor],
        constant: float = 0.0,
    ) -> None:
        self.names, self.options, self.constant = tuple(names), dict(options), constant
        self.tables = dict(tables)

    def __call__(self, probabilities: Mapping[str, Tensor]) -> Tensor:
        given = {name: self._checked(name, probabilities) for name in self.names}
        like = next(iter(given.values()), torch.zeros(()))
        total = like.new_full((), self.constant)
        for names, table in self.tables.items():
            mean = table.to(like)
            for name in reversed(names):  # a decision a dimension, the last one first
                mean = mean @ given[name]
            total = total + mean
        return total

    def _checked(self, name: str, probabilities: Mapping[str, Tensor]) -> Tensor:
        if name not in probabilities:
            raise SpaceError(
                f"the expected cost needs the probabilities of {name!r}: give one for each option"
            )
        found, wanted = probabilities[name], len(self.options[name])
        if tuple(found.shape) != (wanted,):
            raise SpaceError(
                f"the probabilities of {name!r} must be ({wanted},), one an option, got"
                f" {tuple(found.shape)}"
            )
        return found

    def at(self, candidate: Mapping[str, Option]) -> float:
        """The cost of one candidate of the space: every probability 0 or 1."""
        one = {name: _one_hot(self.options[name], candidate.get(name)) for name in self.names}
        return float(self(one))


def _one_hot(options: tuple[Option, ...], chosen: Option | None) -> Tensor:
    """1 at the option; where the decision is not active, at the first: its table doesn't vary."""
    out = torch.zeros(len(options), dtype=torch.float64)
    out[0 if chosen is None else options.index(chosen)] = 1.0
    return out


def expected_cost(
    supernet: Supernet, price: Price, names: Sequence[str] | None = None, constant: float = 0.0
) -> Expected:
    """The expected cost of a supernet's networks; exact where the units' costs add up.

    `price(module, shape)` prices one unit, a plain module, on one input of `shape` (no batch
    dimension). `names`: the decisions that have probabilities, by default those that the supernet
    can mix; others stay at what is active (the largest by default). `constant` is added.
    Each different combination of a unit's options is built and priced once, now.
    Errors: `SpaceError` for an unknown name, a decision without options, or too many combinations.
    """
    space = supernet.space
    chosen = tuple(supernet.mixable if names is None else names)
    for name in chosen:
        if name not in space:
            raise SpaceError(unknown("decision", name, space.names))
        if isinstance(space[name], Real):
            raise SpaceError(f"{name!r} is a real number: only options have probabilities")
    tables: dict[tuple[str, ...], Tensor] = {}  # units that hang on the same decisions share one
    for names_of, table in _Tables(supernet, price, chosen).all():
        held = tables.get(names_of)
        tables[names_of] = table if held is None else held + table
    options = {name: tuple(space[name].options) for name in chosen}
    return Expected(chosen, options, tables, constant)


class _Tables:
    """A table of costs for each unit, a dimension a decision that the cost hangs on."""

    def __init__(self, supernet: Supernet, price: Price, names: tuple[str, ...]) -> None:
        self._net, self._price, self._names = supernet, price, names
        self._space = supernet.space
        running = supernet.active or supernet.uniform(1.0)
        self._base = np.asarray(self._space.encode([running]))
        self._gates = self._probed()

    def all(self) -> Iterator[tuple[tuple[str, ...], Tensor]]:
        """The decisions and the table of each unit."""
        for unit in self._net.units():
            wanted = self._with_conditions({*unit.decisions, *self._gates[unit.name]})
            names = tuple(n for n in self._space.names if n in wanted and n in self._names)
            yield names, self._table(unit.name, names)

    def _with_conditions(self, names: set[str]) -> set[str]:
        """The decisions, and all that decide whether they are active."""
        found: set[str] = set()
        while names:
            found |= names
            names = {parent for n in names for parent in self._space[n].when} - found
        return found

    def _table(self, unit: str, names: tuple[str, ...]) -> Tensor:
        counts = [self._space[name].count for name in names]
        number = math.prod(counts)
        if number > MOST:
            raise SpaceError(
                f"unit {unit} has {number:,} combinations of {', '.join(names)}, at most {MOST:,}"
                " are priced: give fewer names, or a family with smaller units"
            )
        columns = [self._space.names.index(name) for name in names]
        codes = np.repeat(self._base, number, axis=0)
        codes[:, columns] = np.indices(counts).reshape(len(counts), number).T
        candidates = self._space.decode(self._space.canonical(codes))
        known: dict[Candidate, float] = {}
        for candidate in candidates:
            if candidate not in known:
                known[candidate] = self._cost(unit, candidate)
        costs = [known[candidate] for candidate in candidates]
        return torch.tensor(costs, dtype=torch.float64).reshape(counts)

    def _cost(self, unit: str, candidate: Candidate) -> float:
        found = _unseeded(self._net, unit, candidate)
        return 0.0 if found is None else float(self._price(*found))

    def _probed(self) -> dict[str, set[str]]:
        """For each unit the decisions that switch it on or off, found by changing each alone.

        From the smallest and the largest network. Likely are decisions that others hang on, and
        those that no unit names.
        """
        space, units = self._space, self._net.units()
        parents = {name for decision in space.decisions for name in decision.when}
        claimed = {name for unit in units for name in unit.decisions}
        found: dict[str, set[str]] = {unit.name: set() for unit in units}
        suspects = [n for n in space.names if n in parents or n not in claimed]
        for start in (space.corner(False), space.corner(True)):
            before = self._running(start)
            for name in suspects:
                for code in range(getattr(space[name], "count", 0)):
                    other = start.copy()
                    other[0, space.names.index(name)] = code
                    after = self._running(space.canonical(other))
                    for unit in before ^ after:
                        found[unit].add(name)
        return found

    def _running(self, row: Any) -> set[str]:
        candidate = self._space.decode(row)[0]
        units = self._net.units()
        return {u.name for u in units if self._net.unit(u.name, candidate) is not None}


def _unseeded(
    net: Supernet, unit: str, candidate: Candidate
) -> tuple[nn.Module, tuple[int, ...]] | None:
    with torch.random.fork_rng(devices=[]):  # whatever making it draws is given back
        return net.unit(unit, candidate)


# --- prices of a unit --------------------------------------------------------------------------


def counted(what: str) -> Price:
    """The price of a unit as counted: "params", "macs" or "bytes" (see `costs.Count`).

    Peak memory is no sum over units, and is refused. Errors: `SpaceError`.
    """
    additive = ("params", "macs", "bytes")
    if what not in additive:
        raise SpaceError(unknown("additive count", what, additive))

    def price(module: nn.Module, shape: tuple[int, ...]) -> float:
        found: Count = count(module, torch.zeros(1, *shape))
        return float(getattr(found, what))

    return price


def expected_latency(
    supernet: Supernet, predicted: PredictedLatency, names: Sequence[str] | None = None
) -> Expected:
    """The expected milliseconds by a calibrated table of measured pieces, its overhead included."""
    overhead = float(predicted.error["overhead_ms"])
    return expected_cost(supernet, latency_price(predicted), names, overhead)


def latency_price(predicted: PredictedLatency) -> Price:
    """The milliseconds that a unit adds to a network, by a calibrated table of measured pieces.

    A unit that was not measured is filled in by the table's regression over work. The overhead of
    a network is not in it. Errors: `EspalierError` before calibration.
    """
    table = predicted.to_json()
    scale, pieces = float(table["scale"]), table["pieces"]
    work = np.array([entry["work"] for entry in pieces.values()])
    ms = np.array([entry["ms"] for entry in pieces.values()])
    fill = Filler(table["filler"], work, ms)

    def price(module: nn.Module, shape: tuple[int, ...]) -> float:
        run = record(module, torch.zeros(1, *shape))
        entry = pieces.get(fingerprint(run))
        if entry is not None:
            return scale * float(entry["ms"])
        return scale * fill(features(run))

    return price
