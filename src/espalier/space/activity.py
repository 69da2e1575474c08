"""Which decisions are active in which rows, and what follows: canonical rows, codes in range."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from espalier.errors import SpaceError
from espalier.space import few
from espalier.space.layout import Codes, Gate, Layout, Mask


def among(column: Codes, allowed: NDArray[np.int64]) -> Mask:
    """Where a column holds one of a few codes."""
    first, last = int(allowed[0]), int(allowed[-1])
    if last - first + 1 == len(allowed):
        return np.asarray(
            column == first if first == last else (column >= first) & (column <= last)
        )
    return np.isin(column, allowed)


def gate_mask(gate: Gate, codes: Codes, masks: dict[int, Mask]) -> Mask:
    """Where the gate's child is active; `masks` holds those of earlier gated columns."""
    out: Mask | None = None
    for parent, allowed in gate.parents:
        here = among(codes[:, parent], allowed)
        if parent in masks:
            here &= masks[parent]
        out = here if out is None else out & here
    assert out is not None
    return out


def gate_masks(layout: Layout, codes: Codes) -> dict[int, Mask]:
    """Where each gated column is active; the other columns always are."""
    masks: dict[int, Mask] = {}
    for gate in layout.gates:
        masks[gate.child] = gate_mask(gate, codes, masks)
    return masks


def active(layout: Layout, codes: Codes) -> Mask:
    """Which columns of each row are active, `(n, d)`."""
    out = np.ones(codes.shape, dtype=np.bool_, order="F")
    for j, mask in gate_masks(layout, codes).items():
        out[:, j] = mask
    return out


def settle(layout: Layout, codes: Codes) -> dict[int, Mask]:
    """Makes `codes` canonical in place: inactive columns at their first code. Gives the masks."""
    masks = gate_masks(layout, codes)
    for j, mask in masks.items():
        codes[~mask, j] = layout.low[j]
    if layout.dtype.kind == "f":
        for j in np.flatnonzero(layout.reals).tolist():
            codes[:, j] += 0.0  # a negative zero would be another key
    return masks


def in_range(layout: Layout, codes: Codes, masks: dict[int, Mask]) -> Mask:
    """Rows whose active columns all hold codes of the decision."""
    if few.few(codes):
        return few.in_range(layout, codes, masks)
    ok = np.ones(len(codes), dtype=np.bool_)
    for j in range(layout.width):
        column = codes[:, j]
        good = (column >= layout.low[j]) & (column <= layout.high[j])
        if column.dtype.kind == "f" and not layout.real[j]:
            good &= column == np.floor(column)
        if j in masks:
            good |= ~masks[j]
        ok &= good
    return ok


def require_in_range(layout: Layout, codes: Codes, masks: dict[int, Mask]) -> None:
    """Errors: `SpaceError` for an active code that its decision does not have."""
    if not codes.size:
        return
    if codes.dtype.kind == "i" and not few.few(codes):
        low, high = codes.min(axis=0).tolist(), codes.max(axis=0).tolist()
        ends = zip(low, high, layout.high, strict=True)
        if all(a >= 0 and b <= top for a, b, top in ends):
            return
    good = in_range(layout, codes, masks)
    if good.all():
        return
    i = int(np.flatnonzero(~good)[0])
    for j in range(layout.width):
        value, low_j, high_j = codes[i, j].item(), layout.low[j], layout.high[j]
        on = j not in masks or bool(masks[j][i])
        if on and not (low_j <= value <= high_j and (layout.real[j] or value == int(value))):
            rule = f"the code of {layout.names[j]!r} must be in {low_j:g} to {high_j:g}"
            kind = "" if layout.real[j] else " and whole"
            raise SpaceError(f"{rule}{kind}, got {value:g} in row {i}")
