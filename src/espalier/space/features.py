"""Rows as features for models: one-hot columns, and distances."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from espalier.space.activity import gate_masks, require_in_range
from espalier.space.decisions import Categorical, Real
from espalier.space.layout import Codes, Layout


def one_hot_names(layout: Layout) -> tuple[str, ...]:
    """The columns' names: "width=16", "dropout", and "dropout:active" under a condition."""
    names: list[str] = []
    for d, wide in zip(layout.decisions, layout.wide, strict=True):
        if not wide:
            names += [f"{d.name}={option}" for option in d.options]
        else:
            names += [d.name, f"{d.name}:active"] if d.when else [d.name]
    return tuple(names)


def one_hot(layout: Layout, codes: Codes) -> NDArray[np.float32]:
    """Features `(n, k)`: a column an option; inactive decisions are all 0.

    Real decisions, and integers of more than 64 options, are one column scaled to 0..1 (of the
    logarithm if log), with a second one for being active where they have a condition.
    """
    masks = gate_masks(layout, codes)
    require_in_range(layout, codes, masks)
    out = np.zeros((len(codes), len(one_hot_names(layout))), dtype=np.float32)
    k = 0
    for j, d in enumerate(layout.decisions):
        on = masks.get(j)
        if not layout.wide[j]:
            rows = np.arange(len(codes)) if on is None else np.flatnonzero(on)
            out[rows, k + codes[rows, j].astype(np.intp)] = 1
            k += d.count
            continue
        unit = _unit(layout, j, codes)
        out[:, k] = unit if on is None else np.where(on, unit, 0)
        k += 1
        if on is not None:
            out[:, k] = on
            k += 1
    return out


def _unit(layout: Layout, j: int, codes: Codes) -> NDArray[np.float64]:
    """Column j scaled to 0..1."""
    column = codes[:, j].astype(np.float64)
    low, high = float(layout.low[j]), float(layout.high[j])
    d = layout.decisions[j]
    if isinstance(d, Real) and d.log:
        return np.asarray(np.log(column / low) / np.log(high / low))
    return np.asarray((column - low) / (high - low if high > low else 1.0))


def distance(layout: Layout, a: Codes, b: Codes) -> NDArray[np.float64]:
    """Mean over the decisions `(n, m)`, in 0..1 (Gower, 1971).

    A categorical decision counts 0 or 1, the others their gap as a share of the range; 1 where
    only one row has the decision active, 0 where neither has.
    """
    masks_a, masks_b = gate_masks(layout, a), gate_masks(layout, b)
    require_in_range(layout, a, masks_a)
    require_in_range(layout, b, masks_b)
    out = np.zeros((len(a), len(b)))
    for j, d in enumerate(layout.decisions):
        if isinstance(d, Categorical):
            gap = (a[:, j, None] != b[None, :, j]).astype(np.float64)
        else:
            gap = np.abs(_unit(layout, j, a)[:, None] - _unit(layout, j, b)[None, :])
        if j in masks_a:
            on_a, on_b = masks_a[j][:, None], masks_b[j][None, :]
            gap = np.where(on_a & on_b, gap, on_a ^ on_b)
        out += gap
    return out / max(layout.width, 1)
