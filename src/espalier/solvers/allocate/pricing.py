"""Costs of a family as factors: a table for each of its units over the decisions of that unit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from espalier.costs import Builder, Counts
from espalier.costs.cost import CodeCost
from espalier.costs.pieces import Terms
from espalier.errors import EspalierError, unknown
from espalier.solvers.allocate.cpsat import Model
from espalier.solvers.allocate.factor import Array, Factor, columns
from espalier.space import Real, Space

Codes = NDArray[Any]
_GATED = 50_000  # combinations of pairs with all options of what others hang on
_MOST = 2000  # combinations of one unit that are looked up; beyond, pairs of decisions


class Additive(Protocol):
    """A cost that is a sum over the pieces of networks: `Counts`, `PredictedLatency`."""

    def terms(self, metric: str) -> Terms: ...


def cost_factors(
    family: Builder, metric: str, priced: type[CodeCost] | CodeCost = Counts
) -> list[Factor]:
    """A cost as factors, one for each unit of the family: their total is what the cost estimates.

    `priced` is `Counts`, or a calibrated `PredictedLatency`; any metric of its, "latency_ms" among
    them. A unit that very many combinations decide (an input joined of many) is taken as a sum over
    pairs of decisions around the last options: exact for counts of layers between two widths, dearer
    than it is where three or more decisions multiply (both widths and the bits).
    Errors: `EspalierError` for a family without units, whose costs are no sum, or with real
    decisions.
    """
    cost: Any = priced(family) if isinstance(priced, type) else priced  # type: ignore[call-arg]
    names = [m.name for m in cost.metrics]
    if metric not in names:
        raise EspalierError(unknown("metric of this cost", metric, names))
    if not hasattr(cost, "terms"):
        raise EspalierError(f"{type(cost).__name__} is no sum over pieces: give Counts or a table")
    terms: Terms = cost.terms(metric)
    scopes = terms.pieces.scopes()
    if scopes is None:
        raise EspalierError(
            f"{metric} of this family can't be told as a sum over units: it has no units() that add "
            "up to its networks; use search"
        )
    return _constant(terms) + _tables(family.space, terms, scopes)


def _constant(terms: Terms) -> list[Factor]:
    return [Factor((), np.array(terms.constant), name="overhead")] if terms.constant else []


def _tables(space: Space, terms: Terms, scopes: Any) -> list[Factor]:
    grids = {}
    for name, scope in scopes.items():
        within = closed(space, scope)
        grids[name] = [(of, _allowed(space, rows, within)) for of, rows in _grid(space, within)]
    rows = [rows for grid in grids.values() for _, rows in grid]
    lengths = np.cumsum([0, *map(len, rows)])
    every = np.concatenate([space.corner(True), *rows])[1:]
    built = space.valid(every)
    # what the space forbids can't be built; the program never chooses it, so any value does
    parts = list(terms.pieces.parts(np.where(built[:, None], every, _last(space))))
    factors, k = [], 0
    for (name, grid), part in zip(grids.items(), parts, strict=True):
        worth = part.values(np.array([terms.of(p) for p in part.pieces], dtype=float))
        found = []
        for chosen, _ in grid:
            shape = tuple(space[d].count for d in chosen)
            found.append((chosen, worth[lengths[k] : lengths[k + 1]].reshape(shape)))
            k += 1
        factors += (
            _expanded(found, name, terms.peak)
            if len(found) > 1
            else [Factor(*found[0], peak=terms.peak, name=name)]
        )
    return factors


def closed(space: Space, scope: Sequence[str]) -> tuple[str, ...]:
    """Decisions and those that their being active depends on, in the order of the space."""
    found = set(scope)
    while more := {p for name in found for p in space[name].when} - found:
        found |= more
    for name in found:
        if isinstance(space[name], Real):
            raise EspalierError(f"a program chooses among listed options; {name!r} is real")
    return tuple(name for name in space.names if name in found)


def _grid(space: Space, scope: tuple[str, ...]) -> list[tuple[tuple[str, ...], Codes]]:
    """The rows of all combinations; where they are too many, of every one and pair of decisions, with
    all options of those that others hang on: a block that is left out costs nothing, however wide."""
    if math.prod(space[name].count for name in scope) <= _MOST:
        return [(scope, _rows(space, scope))]
    gates = tuple(n for n in scope if any(n in space[m].when for m in scope))
    chosen = _pairs(scope, gates)
    if sum(math.prod(space[n].count for n in gates + names) for names in chosen) > _GATED:
        gates, chosen = (), _pairs(scope, ())
    return [(gates + names, _rows(space, gates + names)) for names in chosen]


def _pairs(scope: Sequence[str], gates: Sequence[str]) -> list[tuple[str, ...]]:
    free = [name for name in scope if name not in gates]
    return [(), *((name,) for name in free), *combinations(free, 2)]


def _rows(space: Space, names: Sequence[str]) -> Codes:
    """Every combination of some decisions' options, the others at their last, canonical."""
    counts = [space[name].count for name in names]
    rows = np.repeat(_last(space), math.prod(counts), axis=0)
    for j, codes in zip(
        columns(space, names), np.indices(counts).reshape(len(counts), len(rows)), strict=True
    ):
        rows[:, j] = codes
    return space.canonical(rows)


def _allowed(space: Space, rows: Codes, scope: Sequence[str]) -> Codes:
    """Rows as they are, but those that constraints forbid only for what stands outside a scope have
    that changed: to one option all (equal widths are one choice), or as a program finds it."""
    own, tied = set(scope), set(scope)
    while more := {n for c in space.constraints if tied & {*c.names} for n in c.names} - tied:
        tied |= more
    free = [
        j for j, d in enumerate(space.decisions) if d.name in tied - own and not isinstance(d, Real)
    ]
    within = [c for c in space.constraints if {*c.names} <= own]
    bad = np.flatnonzero(~space.valid(rows))
    bad = bad[Space(space.decisions, within).valid(rows[bad])]
    if not len(bad) or not free:
        return rows
    counts = np.array([space.decisions[j].count for j in free])
    out = rows.copy()
    for option in range(counts.max()):
        again = rows[bad]
        again[:, free] = np.minimum(option, counts - 1)
        again = space.canonical(again)
        fits = space.valid(again)
        out[bad[fits]] = again[fits]
        bad = bad[~fits]
        if not len(bad):
            return out
    held = {n for c in space.constraints for n in c.names if n in own}
    keys = columns(space, closed(space, sorted(held)))
    found, which = np.unique(rows[bad][:, keys], axis=0, return_inverse=True)
    completed = Model(space).completed(keys, found)
    again = rows[bad]
    again[:, free] = completed[which.ravel()][:, free]
    again = space.canonical(again)
    fits = space.valid(again)
    out[bad[fits]] = again[fits]
    return out


def _last(space: Space) -> Codes:
    """Every decision at its last option, whether active or not."""
    return np.array([[d.count - 1 for d in space.decisions]], dtype=space.dtype)


def _expanded(
    found: Sequence[tuple[tuple[str, ...], Array]], name: str, peak: bool
) -> list[Factor]:
    """Tables of none, one and two decisions as terms that add up (anchored at the last options), each
    over the decisions of the first table besides."""
    if peak:
        raise EspalierError(f"the peak of {name!r} hangs on too many decisions for a program")
    gates, origin = found[0]
    own = [(scope[len(gates) :], table) for scope, table in found]
    alone = {scope[0]: table - origin[..., None] for scope, table in own if len(scope) == 1}
    factors = [Factor(gates, origin, name=name)]
    factors += [Factor((*gates, d), table, name=name) for d, table in alone.items()]
    for scope, table in own:
        if len(scope) == 2:
            first, second = alone[scope[0]], alone[scope[1]]
            both = table - first[..., None] - second[..., None, :] - origin[..., None, None]
            if np.abs(both).max() > 1e-12 * np.abs(table).max():
                factors.append(Factor((*gates, *scope), both, name=name))
    return factors
