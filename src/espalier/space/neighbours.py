"""Rows of note: those one decision away, and the corners."""

from __future__ import annotations

import numpy as np

from espalier.space.activity import settle
from espalier.space.decisions import Real
from espalier.space.layout import Codes, Layout, empty
from espalier.space.repair import Rules, valid
from espalier.space.rows import unique

_STEP = 0.1


def neighbours(layout: Layout, rules: Rules, row: Codes) -> Codes:
    """Every valid row that differs from `row` `(1, d)` in one active decision, canonical.

    Decisions that this activates are at their first option. A real decision has four: its ends,
    and a step of 10% of the range (of its logarithm if log) down and up. So has an integer of
    more than 64 options, and the numbers next to it.
    """
    base = np.array(row, order="F", copy=True)
    masks = settle(layout, base)
    others: list[tuple[int, float]] = []
    for j in range(layout.width):
        if j not in masks or masks[j][0]:
            here = base[0, j]
            others += [(j, code) for code in _codes(layout, j, float(here)) if code != here]
    out = empty(layout, len(others))
    out[:] = base
    for i, (j, code) in enumerate(others):
        out[i, j] = code
    # what the change activates was canonical, hence is at its first option
    settle(layout, out)
    out = np.asfortranarray(out[valid(layout, rules, out)])
    return np.asfortranarray(out[unique(layout, out)])


def _codes(layout: Layout, j: int, here: float) -> list[float]:
    d = layout.decisions[j]
    if not layout.wide[j]:
        return list(range(d.count))
    low, high = layout.low[j], layout.high[j]
    if not isinstance(d, Real):
        leap = round((high - low) * _STEP)
        return [low, *(min(max(here + s, low), high) for s in (-leap, -1, 1, leap)), high]
    if d.log:
        step = (d.high / d.low) ** _STEP
        near = (here / step, here * step)
    else:
        step = (d.high - d.low) * _STEP
        near = (here - step, here + step)
    return [d.low, *(min(max(v, d.low), d.high) for v in near), d.high]


def corner(layout: Layout, last: bool) -> Codes:
    """The row `(1, d)` of first or last options, canonical; constraints are not looked at."""
    out = empty(layout, 1)
    out[0] = layout.high if last else layout.low
    settle(layout, out)
    return out
