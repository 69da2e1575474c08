"""All the candidates of a space."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from espalier.errors import SpaceError
from espalier.space.activity import gate_mask
from espalier.space.counting import size
from espalier.space.layout import Codes, Layout, Mask
from espalier.space.rules import Rule


def expand(layout: Layout, rules: tuple[Rule, ...], limit: int) -> Codes:
    """Every valid row, in lexicographic order. Errors: `SpaceError` beyond `limit` rows."""
    for name, is_real in zip(layout.names, layout.real, strict=True):
        if is_real:
            raise SpaceError(f"a space with a real decision can't be listed: {name!r}; sample it")
    total = size(layout)
    if not rules and total > limit:
        raise SpaceError(_too_many(total, limit))
    rows = np.zeros((1, layout.width), dtype=layout.dtype, order="F")
    masks: dict[int, Mask] = {}
    gates = {gate.child: gate for gate in layout.gates}
    placed: set[int] = set()
    for j in layout.order:
        on = gate_mask(gates[j], rows, masks) if j in gates else np.ones(len(rows), dtype=np.bool_)
        times = np.where(on, layout.counts[j], 1)
        # room for what constraints take away again, but not without end
        if int(times.sum()) > max(limit, 1) * (16 if rules else 1):
            raise SpaceError(_too_many(total, limit))
        rows, masks = _grown(rows, j, times, masks)
        if j in gates:
            masks[j] = np.repeat(on, times)
        placed.add(j)
        for rule in rules:
            if j in rule.columns and placed.issuperset(rule.columns):
                good = rule.violation(rows, masks) == 0
                rows = np.asfortranarray(rows[good])
                masks = {k: m[good] for k, m in masks.items()}
    if len(rows) > limit:
        raise SpaceError(_too_many(total, limit))
    return np.asfortranarray(rows[np.lexsort(rows.T[::-1])]) if layout.width else rows


def _grown(
    rows: Codes, j: int, times: NDArray[np.int64], masks: dict[int, Mask]
) -> tuple[Codes, dict[int, Mask]]:
    """Each row `times` over, counting up in column j."""
    starts = np.cumsum(times) - times
    grown = np.asfortranarray(np.repeat(rows, times, axis=0))
    grown[:, j] = np.arange(len(grown)) - np.repeat(starts, times)
    return grown, {k: np.repeat(m, times) for k, m in masks.items()}


def _too_many(total: int | float, limit: int) -> str:
    has = f"the space has {total:,} candidates before constraints"
    return f"{has}, more than the limit {limit:,}; raise it, or sample"
