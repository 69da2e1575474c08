"""The expected cost of a supernet from the pieces that pricing has met already.

The same sum as `solvers.relax.expected_cost`, without building any network again: a limit is looked
up in the tables that also price candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from espalier.costs import PredictedLatency, UnitFamily
from espalier.costs.filler import Filler
from espalier.costs.pieces import Part, Piece, pieces_of
from espalier.nets import Supernet
from espalier.solvers.relax.expected import MOST, Expected
from espalier.space import Candidate, Space

Value = Callable[[Piece], float]
COUNTED = ("params", "macs", "bytes")  # what adds up over pieces


def expected(
    family: Supernet, value: Value, names: Sequence[str], base: Candidate, constant: float = 0.0
) -> Expected | None:
    """The mean of a cost under probabilities of the decisions `names`; others are as in `base`.

    None where the family's pieces don't add up, or where one hangs on too many options.
    """
    space = family.space
    tables: dict[tuple[str, ...], torch.Tensor] = {}
    whole = [_values(part, value) for part in pieces_of(family).parts(space.encode([base]))]
    if not isinstance(family, UnitFamily) or len(whole) != len(family.units()):
        return None
    for place, wanted in enumerate(_wanted(family)):
        order = [name for name in space.names if name in wanted and name in names]
        counts = [space[name].count for name in order]
        number = math.prod(counts)
        if number > MOST:
            return None
        codes = np.repeat(space.encode([base]), number, axis=0)
        columns = [space.names.index(name) for name in order]
        codes[:, columns] = np.indices(counts).reshape(len(counts), number).T
        part = next(islice(pieces_of(family).parts(space.canonical(codes)), place, None))
        assert part is not None
        table = torch.from_numpy(_values(part, value)).reshape(counts)
        held = tables.get(tuple(order))
        tables[tuple(order)] = table if held is None else held + table
    options = {name: tuple(space[name].options) for name in names}
    made = Expected(names, options, tables, constant)
    right = math.isclose(made.at(base), constant + sum(float(v[0]) for v in whole), rel_tol=1e-6)
    return made if right else None


def _values(part: Part, value: Value) -> NDArray[np.float64]:
    return part.values(np.array([value(piece) for piece in part.pieces], dtype=float))


def counted(metric: str) -> Value:
    """A counted cost of a piece: one of `COUNTED`."""
    return lambda piece: float(getattr(piece.count, metric))


def predicted(latency: PredictedLatency) -> Value:
    """The milliseconds that a piece adds to a network, its overhead aside."""
    table = latency.to_json()
    scale, pieces = float(table["scale"]), table["pieces"]
    work = np.array([entry["work"] for entry in pieces.values()])
    ms = np.array([entry["ms"] for entry in pieces.values()])
    fill = Filler(table["filler"], work, ms)

    def milliseconds(piece: Piece) -> float:
        if piece.key in pieces:
            return scale * float(pieces[piece.key]["ms"])
        return scale * fill(piece.work)

    return milliseconds


def _wanted(family: Any) -> list[set[str]]:
    """The decisions that each unit's cost hangs on: its own, and those that switch it on or off."""
    space: Space = family.space
    units = list(family.units())
    found = [{*unit.decisions} for unit in units]
    for start in (space.corner(False), space.corner(True)):
        rows, changed = _changed(space, start)
        for place, part in enumerate(pieces_of(family).parts(np.concatenate([start, rows]))):
            runs = part.index >= 0
            toggled = np.flatnonzero(runs[1:] != runs[0])
            found[place].update(changed[i] for i in toggled)
    return [_with_parents(space, names) for names in found]


def _changed(space: Space, start: NDArray[Any]) -> tuple[NDArray[Any], list[str]]:
    """The rows that differ from `start` in one option, and in which decision."""
    rows, names = [], []
    for column, decision in enumerate(space.decisions):
        for code in range(decision.count):
            row = start.copy()
            row[0, column] = code
            rows.append(space.canonical(row))
            names.append(decision.name)
    return np.concatenate(rows), names


def _with_parents(space: Space, names: set[str]) -> set[str]:
    """The decisions, and all that decide whether they are active."""
    found: set[str] = set()
    while names:
        found |= names
        names = {parent for name in names for parent in space[name].when} - found
    return found
