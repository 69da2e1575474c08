"""Why no candidate keeps the limits: which of them can't be kept, and what is reachable."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from espalier.problem import Limit
from espalier.solvers.allocate.tables import negative, whole

if TYPE_CHECKING:
    from espalier.solvers.allocate.program import Program

Codes = NDArray[Any]
_SECONDS = 5.0  # for each question


def reason(program: Program, refused: Sequence[Codes], seconds: float) -> str:
    """One line: the limit that is furthest from what is reachable, alone or with the others."""
    limits = program.limits
    alone = [(limit, _reach(program, limit, (), refused, seconds)) for limit in limits]
    broken = [(m, r) for m, r in alone if r is not None and m.violation(r) > 1e-12]
    if broken:
        limit, reach = max(broken, key=lambda pair: float(pair[0].violation(pair[1])))
        return f"{limit} can't be kept: {_reachable(limit)} is {reach:.6g}"
    together = [
        (limit, _reach(program, limit, [m for m in limits if m is not limit], refused, seconds))
        for limit in limits
    ]
    found = [
        f"{_reachable(m)} with the others kept is {r:.6g}" for m, r in together if r is not None
    ]
    if len(limits) < 2 or not found:
        return f"no candidate of the space keeps {told(limits)} and the space's constraints"
    return f"{told(limits)} can't be kept together: {'; '.join(found)}"


def _reach(
    program: Program,
    limit: Limit,
    others: Sequence[Limit],
    refused: Sequence[Codes],
    seconds: float,
) -> float | None:
    """The best value of a limit's cost under other limits, as far as time allows; None where there
    is none."""
    seconds = min(seconds, _SECONDS)
    tables = program.tables[limit.metric]
    model = program.model(others, refused)
    model.minimise(whole(tables if limit.op == "<=" else negative(tables)))
    answer = model.solve(seconds, 1, 0)
    if answer.row is None:
        return None
    found = program.cost(limit.metric, answer.row[None])
    peaks = [f.values.ravel() for f in program.costs[limit.metric] if f.peak]
    lower = np.unique(np.concatenate([*peaks, np.empty(0)]))
    least = max((float(p.min()) for p in peaks), default=-np.inf)
    low, high = (int(np.searchsorted(lower, v)) for v in (least, found))
    until = time.monotonic() + seconds
    while low < high:  # the least peak under which there still is a candidate
        middle = (low + high) // 2
        below = replace(limit, bound=float(lower[middle]))
        model = program.model([*others, below], refused)
        if (left := until - time.monotonic()) <= 0:
            break
        answer = model.solve(left, 1, 0)
        if answer.row is not None:
            high, found = middle, program.cost(limit.metric, answer.row[None])
        elif answer.status == "infeasible":
            low = middle + 1
        else:
            break
    return found


def told(limits: Iterable[Limit]) -> str:
    """Limits in a line."""
    return ", ".join(map(str, limits)) or "no limit"


def _reachable(limit: Limit) -> str:
    return f"the {'least' if limit.op == '<=' else 'most'} {limit.metric} that is reachable"
