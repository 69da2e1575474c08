"""Sums of factors as few tables of whole numbers, as an integer program takes them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.solvers.allocate.factor import Array, Factor, columns
from espalier.space import Space

Scope = tuple[int, ...]  # columns, increasing
Tables = dict[Scope, Array]
_FINE = 2.0**40  # steps of a whole number that stand for the largest sum of interest
_EXACT = 2.0**50
_LOOSE = 2.0**60


def ordered(space: Space, factor: Factor) -> tuple[Scope, Array]:
    """A factor's columns, increasing, and its table with the axes in their order."""
    where = columns(space, factor.decisions)
    return tuple(sorted(where)), factor.values.transpose(np.argsort(where).astype(int))


def merged(space: Space, factors: Iterable[Factor]) -> Tables:
    """One table for each set of decisions: the sum of the factors over them, taken apart first.

    A decision that changes nothing is dropped from a table, and a table that is a sum of its axes
    becomes one table an axis: what is left joined is what must be decided jointly.
    """
    whole: Tables = {}
    for factor in factors:
        scope, values = ordered(space, factor)
        whole[scope] = whole[scope] + values if scope in whole else values
    out: Tables = {}
    for scope, values in whole.items():
        for part, table in _apart(scope, values):
            out[part] = out[part] + table if part in out else table
    return out


def _apart(scope: Scope, values: Array) -> list[tuple[Scope, Array]]:
    """A table as tables over fewer decisions, where it is exactly that."""
    varied = [k for k in range(values.ndim) if not (values == values.take([0], axis=k)).all()]
    if len(varied) < values.ndim:
        first = tuple(slice(None) if k in varied else 0 for k in range(values.ndim))
        scope, values = tuple(scope[k] for k in varied), values[first]
    if values.ndim < 2 or not np.isfinite(values).all():
        return [(scope, np.asarray(values))]
    origin = float(values.flat[0])
    axes = [
        values[tuple(slice(None) if k == axis else 0 for k in range(values.ndim))] - origin
        for axis in range(values.ndim)
    ]
    total = np.full(values.shape, origin)
    for axis, column in enumerate(axes):
        total = total + column.reshape([-1 if k == axis else 1 for k in range(values.ndim)])
    if (total != values).any():
        return [(scope, values)]
    alone = [((j,), column) for j, column in zip(scope, axes, strict=True)]
    return [((), np.array(origin)), *alone]


@dataclass(frozen=True)
class Whole:
    """Tables of whole numbers from 0: a true sum is at least `base + sum / scale`.

    Every number is rounded down, so the true sum is above that by less than `slack`.
    """

    tables: dict[Scope, NDArray[np.int64]]
    forbidden: dict[Scope, NDArray[np.bool_]]
    base: float
    scale: float
    slack: float

    def bound(self, limit: float) -> int:
        """The largest whole sum of which the true sum may keep `limit`; -1 where none can."""
        room = limit - self.base
        # far beyond every sum, so no limit at all, and still a number that the solver takes
        return math.floor(min(room * self.scale, _LOOSE)) if room >= 0 else -1

    def true(self, total: float) -> float:
        """The least true sum of a whole one."""
        return self.base + total / self.scale


def whole(tables: Mapping[Scope, Array], interest: float | None = None) -> Whole:
    """Tables as whole numbers; sums above `interest` need not be told apart.

    Whole numbers stay as they are. Others are scaled by a power of two, so that the sums of
    interest are told apart to 2^-40 of their span.
    """
    lows = {
        s: float(t[np.isfinite(t)].min()) if np.isfinite(t).any() else 0.0
        for s, t in tables.items()
    }
    base = math.fsum(lows.values())
    moved = {s: t - lows[s] for s, t in tables.items()}
    finite = [t[np.isfinite(t)] for t in moved.values()]
    span = math.fsum(float(t.max()) for t in finite if t.size)
    integral = all((t == np.floor(t)).all() for t in (*finite, np.array([*lows.values(), base])))
    integral = integral and span + abs(base) < _EXACT
    if interest is not None and interest > base:
        span = min(span, interest - base)
    scale = 1.0 if integral or span <= 0 else 2.0 ** math.floor(math.log2(_FINE / span))
    top = 2.0 * _FINE if not integral else _EXACT
    cut = {
        s: np.floor(np.minimum(np.where(np.isfinite(t), t, 0.0) * scale, top))
        for s, t in moved.items()
    }
    return Whole(
        {s: t.astype(np.int64) for s, t in cut.items()},
        {s: np.isposinf(t) for s, t in moved.items() if np.isposinf(t).any()},
        base,
        scale,
        0.0 if integral else len(tables) / scale,
    )


def negative(tables: Mapping[Scope, Any]) -> Tables:
    """The tables with the sign of every number changed; what was forbidden stays so."""
    return {s: np.where(np.isposinf(t), np.inf, -t) for s, t in tables.items()}
