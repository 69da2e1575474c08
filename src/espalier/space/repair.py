"""Keeping constraints: draw rows that keep them, and move rows that do not."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from espalier.errors import SpaceError
from espalier.space.activity import gate_masks, in_range, settle
from espalier.space.counting import size
from espalier.space.layout import Codes, Layout, Mask, empty
from espalier.space.listing import expand
from espalier.space.rules import Rule, violation
from espalier.space.vary import Rng, changed, draw, fresh, wake

Rules = tuple[Rule, ...]
_LISTABLE = 200_000
_DRAWS = 200_000
_PROPOSALS = 8
_ROUNDS = 24
_BLOCK = 1 << 15


def valid(layout: Layout, rules: Rules, codes: Codes) -> Mask:
    """Rows in range that keep every constraint; what inactive columns hold does not matter."""
    masks = gate_masks(layout, codes)
    ok = in_range(layout, codes, masks)
    if rules:
        ok &= violation(rules, codes, masks) == 0
    return ok


def _broken(rules: Rules, layout: Layout, codes: Codes) -> NDArray[np.float64]:
    return violation(rules, codes, gate_masks(layout, codes))


def sample(layout: Layout, rules: Rules, n: int, rng: Rng) -> Codes:
    """n valid rows by rejection. Errors: `SpaceError` when hardly any draw keeps the constraints.

    Where few draws are accepted and the space can be listed, the valid rows are listed and drawn
    with the probability that rejection gives them.
    """
    if not rules:
        return draw(layout, n, rng)
    out = empty(layout, n)
    got = drawn = 0
    while got < n:
        share = max(got / drawn, 1 / 64) if drawn else 0.5
        rows = draw(layout, int(min(max((n - got) / share * 1.05, 64), 1 << 18)), rng)
        drawn += len(rows)
        rows = rows[_broken(rules, layout, rows) == 0][: n - got]
        out[got : got + len(rows)] = rows
        got += len(rows)
        if got < n and drawn >= 10_000 and got < drawn / 100:
            if size(layout) <= _LISTABLE:
                return _sample_listed(layout, rules, n, rng)
            if drawn >= _DRAWS and got < drawn / 10_000:
                raise SpaceError(_hopeless(layout, rules, got, drawn, rng))
    return out


def _sample_listed(layout: Layout, rules: Rules, n: int, rng: Rng) -> Codes:
    rows = expand(layout, rules, _LISTABLE)
    if not len(rows):
        raise SpaceError("no candidate keeps the constraints: loosen or remove one of them")
    masks = gate_masks(layout, rows)
    log_p = np.zeros(len(rows))
    for j, count in enumerate(layout.counts):
        log_p -= np.log(count) * masks.get(j, 1.0)
    p = np.exp(log_p - log_p.max())
    return np.asfortranarray(rows[rng.choice(len(rows), size=n, p=p / p.sum())])


def _hopeless(layout: Layout, rules: Rules, got: int, drawn: int, rng: Rng) -> str:
    rows = draw(layout, 4096, rng)
    masks = gate_masks(layout, rows)
    kept = [float((rule.violation(rows, masks) == 0).mean()) for rule in rules]
    worst = rules[int(np.argmin(kept))]
    return (
        f"the constraints leave too little to sample: {got} of {drawn} draws kept them; "
        f"the hardest is ({worst.text}), kept by {min(kept):.2%}: loosen it, or remove options"
    )


def repair(layout: Layout, rules: Rules, codes: Codes, rng: Rng) -> Codes:
    """A canonical, valid copy; rows that are valid stay, others change in few decisions.

    Codes out of range go to the nearest end. A row that breaks constraints tries changes of one
    decision they name, and takes the one that breaks least, until it keeps them; a row that has
    not by then is drawn anew.
    """
    out = np.array(codes, order="F", copy=True)
    _into_range(layout, out, rng)
    settle(layout, out)
    if not rules:
        return out
    broken = np.flatnonzero(_broken(rules, layout, out))
    for start in range(0, len(broken), _BLOCK):
        rows = broken[start : start + _BLOCK]
        out[rows] = _mend(layout, rules, np.asfortranarray(out[rows]), rng)
    return out


def _into_range(layout: Layout, codes: Codes, rng: Rng) -> None:
    for j in range(layout.width):
        column = codes[:, j]
        if codes.dtype.kind == "f":
            lost = np.flatnonzero(np.isnan(column))
            column[lost] = fresh(layout, j, len(lost), rng)
            if not layout.real[j]:
                np.rint(column, out=column)
        np.clip(column, layout.low[j], layout.high[j], out=column)


def _levers(layout: Layout, rules: Rules) -> list[int]:
    """The columns that bear on the constraints: those they name, and what these depend on."""
    columns = {j for rule in rules for j in rule.columns}
    for gate in reversed(layout.gates):
        if gate.child in columns:
            columns |= {parent for parent, _ in gate.parents}
    return sorted(columns & set(layout.free))


def _mend(layout: Layout, rules: Rules, codes: Codes, rng: Rng) -> Codes:
    levers = np.array(_levers(layout, rules), dtype=np.int64)
    best = _broken(rules, layout, codes)
    left = np.arange(len(codes))
    for _ in range(_ROUNDS if len(levers) else 0):
        tries = np.asfortranarray(np.repeat(codes[left], _PROPOSALS, axis=0))
        _nudge(layout, tries, levers[rng.integers(0, len(levers), size=len(tries))], rng)
        after = _broken(rules, layout, tries).reshape(-1, _PROPOSALS)
        pick = after.argmin(1)
        found = after[np.arange(len(left)), pick]
        # equal is let through too: it walks along plateaus
        take = found <= best[left]
        codes[left[take]] = tries[np.arange(len(left)) * _PROPOSALS + pick][take]
        best[left[take]] = found[take]
        left = left[best[left] > 0]
        if not len(left):
            return codes
    codes[left] = sample(layout, rules, len(left), rng)
    return codes


def _nudge(layout: Layout, codes: Codes, columns: NDArray[np.int64], rng: Rng) -> None:
    """In place: row i changes in column `columns[i]`, if it is active there."""
    before = gate_masks(layout, codes)
    for j in np.unique(columns).tolist():
        rows = np.flatnonzero(columns == j)
        if j in before:
            rows = rows[before[j][rows]]
        codes[rows, j] = changed(layout, j, codes[rows, j], rng)
    wake(layout, codes, before, rng)
