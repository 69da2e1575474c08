"""The border between codes and candidates: decode, encode, check."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from espalier.errors import SpaceError, unknown
from espalier.space.activity import active, require_in_range, settle
from espalier.space.candidate import Candidate
from espalier.space.decisions import Real
from espalier.space.layout import Codes, Layout, empty


def decode(layout: Layout, codes: Codes) -> list[Candidate]:
    """A candidate a row. Errors: `SpaceError` for a code that a decision does not have."""
    settled = np.array(codes, order="F", copy=True)
    masks = settle(layout, settled)
    require_in_range(layout, settled, masks)
    by_name = sorted(range(layout.width), key=lambda j: layout.names[j])
    columns = []
    for j in by_name:
        options, values = layout.decisions[j].options, settled[:, j].tolist()
        told = values if layout.real[j] else [options[int(v)] for v in values]
        columns.append((layout.names[j], told, masks[j].tolist() if j in masks else None))
    return [
        Candidate._of({name: told[i] for name, told, on in columns if on is None or on[i]})
        for i in range(len(codes))
    ]


def encode(layout: Layout, candidates: Iterable[Mapping[str, Any]]) -> Codes:
    """A canonical row a candidate. Errors: `SpaceError` for an unknown decision or option, or a
    decision that is active and left out. Constraints are not looked at.
    """
    listed = list(candidates)
    if any(not isinstance(c, Mapping) for c in listed):
        bad = next(c for c in listed if not isinstance(c, Mapping))
        raise SpaceError(f"a candidate maps decisions to options, got {bad!r}")
    out = empty(layout, len(listed))
    given = np.zeros(out.shape, dtype=np.bool_)
    for i, candidate in enumerate(listed):
        for name, option in candidate.items():
            j = layout.index.get(name)
            if j is None:
                raise SpaceError(unknown("decision", str(name), layout.names))
            out[i, j] = layout.decisions[j].code(option)
            given[i, j] = True
    for j in range(layout.width):
        out[~given[:, j], j] = layout.low[j]
    settle(layout, out)
    _complete(layout, out, given)
    return out


def _complete(layout: Layout, codes: Codes, given: np.ndarray[Any, Any]) -> None:
    absent = active(layout, codes) & ~given
    if absent.any():
        i, j = (int(k[0]) for k in np.nonzero(absent))
        d = layout.decisions[j]
        known = f"{d.low:g} to {d.high:g}" if isinstance(d, Real) else _few(d.options)
        raise SpaceError(
            f"a candidate needs every active decision: {d.name!r} is left out in row {i} ({known})"
        )


def _few(options: Any) -> str:
    return ", ".join(str(o) for o in options[:8]) + (", ..." if len(options) > 8 else "")
