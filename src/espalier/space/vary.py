"""Drawing and varying whole arrays: draw, mutate, cross. None of these looks at constraints."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from espalier.space import few
from espalier.space.activity import gate_mask, gate_masks, require_in_range, settle
from espalier.space.decisions import Real
from espalier.space.layout import Codes, Layout, Mask, empty

Rng = np.random.Generator
_STEP = 0.15


def fresh(layout: Layout, j: int, n: int, rng: Rng) -> Codes:
    """n codes of column j, each option alike (a real one evenly, in its logarithm if log)."""
    decision = layout.decisions[j]
    if not isinstance(decision, Real):
        dtype = layout.dtype if layout.dtype.kind == "i" else np.int64
        return rng.integers(0, layout.counts[j], size=n, dtype=dtype)
    low, high = decision.low, decision.high
    if decision.log:
        drawn = np.exp(rng.uniform(np.log(low), np.log(high), size=n))
    else:
        drawn = low + (high - low) * rng.random(n)
    return np.clip(drawn, low, high)


def draw(layout: Layout, n: int, rng: Rng) -> Codes:
    """n rows, canonical, each active decision drawn on its own."""
    out = empty(layout, n)
    for j in range(layout.width):
        out[:, j] = fresh(layout, j, n, rng)
    settle(layout, out)
    return out


def changed(layout: Layout, j: int, old: Codes, rng: Rng) -> Codes:
    """Other codes for column j: another option, each alike; a real one steps and is clipped.

    The step is normal with 15% of the range (of its logarithm if log).
    """
    decision = layout.decisions[j]
    if not isinstance(decision, Real):
        count = layout.counts[j]
        shift = rng.integers(1, count, size=len(old), dtype=np.int64)
        return (old.astype(np.int64) + shift) % count
    low, high = decision.low, decision.high
    step = _STEP * rng.standard_normal(len(old))
    if decision.log:
        moved = np.exp(np.log(old) + step * np.log(high / low))
    else:
        moved = old + step * (high - low)
    return np.asarray(np.clip(moved, low, high))


def hits(n: int, rate: float, rng: Rng) -> NDArray[np.int64]:
    """Increasing positions below n, each in with probability `rate`: by gaps, not by n draws."""
    if rate <= 0 or n == 0:
        return np.zeros(0, dtype=np.int64)
    if rate >= 1:
        return np.arange(n, dtype=np.int64)
    parts: list[NDArray[np.int64]] = []
    last = -1
    while last < n - 1:
        left = n - 1 - last
        size = int(left * rate + 4 * (left * rate) ** 0.5 + 8)
        gaps = np.minimum(rng.geometric(rate, size=size), n)
        found = last + np.cumsum(gaps)
        parts.append(found)
        last = int(found[-1])
    out = np.concatenate(parts)
    return out[: np.searchsorted(out, n)]


def wake(layout: Layout, codes: Codes, before: dict[int, Mask], rng: Rng) -> dict[int, Mask]:
    """In place: columns that have become active are drawn, inactive ones made canonical."""
    masks: dict[int, Mask] = {}
    for gate in layout.gates:
        j = gate.child
        mask = masks[j] = gate_mask(gate, codes, masks)
        woken = np.flatnonzero(mask & ~before[j])
        if len(woken):
            codes[woken, j] = fresh(layout, j, len(woken), rng)
        codes[~mask, j] = layout.low[j]
    return masks


def mutate(layout: Layout, codes: Codes, rng: Rng, rate: float | None) -> Codes:
    """Changes each active decision with probability `rate`, in a canonical copy.

    With None the rate is one over the decisions that have a choice, and a row that would stay as
    it is changes in one.
    """
    out = np.array(codes, order="F", copy=True)
    before = settle(layout, out)
    require_in_range(layout, out, before)
    n = len(out)
    if not layout.free or n == 0:
        return out
    if few.few(out):
        _mutate_few(layout, out, before, rng, rate)
        return out
    touched = np.zeros(n, dtype=np.bool_)
    share = 1 / len(layout.free) if rate is None else rate
    # positions run down the columns, as the array is stored
    found = hits(n * len(layout.free), share, rng)
    ends = np.searchsorted(found, np.arange(len(layout.free) + 1) * n)
    for i, j in enumerate(layout.free):
        rows = found[ends[i] : ends[i + 1]] - i * n
        if j in before:
            rows = rows[before[j][rows]]
        if len(rows):
            out[rows, j] = changed(layout, j, out[rows, j], rng)
            touched[rows] = True
    if rate is None:
        _change_one(layout, out, np.flatnonzero(~touched), before, rng)
    wake(layout, out, before, rng)
    return out


def _mutate_few(
    layout: Layout, codes: Codes, masks: dict[int, Mask], rng: Rng, rate: float | None
) -> None:
    """In place: what `mutate` does, for a small table."""
    rows, which = np.nonzero(few.hit(layout, len(codes), masks, rng, rate))
    columns = layout.frees[which]
    if codes.dtype.kind == "f":
        real = layout.reals[columns]
        for j in np.unique(columns[real]).tolist():
            here = rows[columns == j]
            codes[here, j] = changed(layout, j, codes[here, j], rng)
        rows, columns = rows[~real], columns[~real]
    few.shifted(layout, codes, rows, columns, rng)
    wake(layout, codes, masks, rng)


def _change_one(
    layout: Layout, codes: Codes, rows: NDArray[np.int64], masks: dict[int, Mask], rng: Rng
) -> None:
    """In place: changes one active decision, each alike, in each of `rows`."""
    pick = np.full(len(rows), -1)
    left = np.arange(len(rows))
    free = np.array(layout.free)
    possible = np.zeros(len(rows), dtype=np.bool_)
    for j in layout.free:
        if j not in masks:
            possible[:] = True
            break
        possible |= masks[j][rows]
    left = left[possible]
    while len(left):
        drawn = free[rng.integers(0, len(free), size=len(left))]
        good = np.ones(len(left), dtype=np.bool_)
        for j in masks:
            at = np.flatnonzero(drawn == j)
            good[at] = masks[j][rows[left[at]]]
        pick[left[good]] = drawn[good]
        left = left[~good]
    for j in np.unique(pick[pick >= 0]).tolist():
        here = rows[pick == j]
        codes[here, j] = changed(layout, j, codes[here, j], rng)


def cross(layout: Layout, a: Codes, b: Codes, rng: Rng) -> Codes:
    """Each decision from row i of `a` or of `b`, alike (uniform crossover; Syswerda, 1989).

    Where one parent has the decision inactive, it comes from the other; where both have, and the
    child has it active, it is drawn.
    """
    masks_a, masks_b = gate_masks(layout, a), gate_masks(layout, b)
    require_in_range(layout, a, masks_a)
    require_in_range(layout, b, masks_b)
    out = empty(layout, len(a))
    if few.few(a) and not layout.gates:
        out[:] = np.where(rng.random(a.shape) < 0.5, a, b)
        return out
    for j in range(layout.width):
        from_a = rng.integers(0, 2, size=len(a), dtype=np.bool_)
        if j in masks_a:
            from_a = np.where(masks_a[j] == masks_b[j], from_a, masks_a[j])
        out[:, j] = np.where(from_a, a[:, j], b[:, j])
    wake(layout, out, {j: masks_a[j] | masks_b[j] for j in masks_a}, rng)
    return out
