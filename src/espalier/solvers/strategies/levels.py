"""The levels of a fidelity decision: to how many epochs a candidate is trained.

A multi-fidelity strategy searches an ordinary space that has one more decision, such as
`ordinal("epochs", 1, 3, 9)`: a row says which candidate, and to which epoch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.errors import EspalierError, SpaceError
from espalier.space import Decision, Integer, Ordinal, Space, ordinal

Codes = NDArray[Any]
Index = NDArray[np.int64]


def extended(space: Space, levels: Iterable[float], fidelity: str = "epochs") -> Space:
    """The space with one more decision, last: to which level. Errors: `SpaceError`."""
    if fidelity in space:
        raise SpaceError(f"the space has a decision {fidelity!r} already: name another fidelity")
    rising = sorted({int(x) if float(x).is_integer() else float(x) for x in levels})
    return Space([*space.decisions, ordinal(fidelity, *rising)], space.constraints)


class Levels:
    """The levels used, of those that the decision `fidelity` has: from its largest down, each at
    most `1 / eta` of the one above, rounded up where all are whole. `amounts` rise.

    `inner` is the space of candidates, without that decision; a space that has none is its own
    and has one level. Errors: `EspalierError` where the decision is no number above 0, or others
    hang on it.
    """

    def __init__(self, space: Space, fidelity: str = "epochs", eta: int = 3) -> None:
        if isinstance(eta, bool) or int(eta) != eta or eta < 2:
            raise EspalierError(f"eta is a whole number from 2: 1 in eta is promoted, got {eta!r}")
        self.space, self.fidelity = space, fidelity
        self.inner, self.column = space, -1
        self.codes: tuple[int, ...] = (0,)
        self.amounts: tuple[float, ...] = (1.0,)
        if fidelity in space:
            self.inner = _without(space, fidelity)
            self.column = space.names.index(fidelity)
            self.codes, self.amounts = _ladder(space[fidelity], eta)

    def __len__(self) -> int:
        return len(self.amounts)

    @property
    def top(self) -> int:
        """The number of the highest level."""
        return len(self) - 1

    def strip(self, codes: Codes) -> Codes:
        """The candidates `(n, d - 1)` of rows of the whole space."""
        if self.column < 0:
            return codes
        return np.delete(codes, self.column, axis=1).astype(self.inner.dtype)

    def at(self, inner: Codes, level: int) -> Codes:
        """Candidates as rows `(n, d)` of the whole space, to one level."""
        if self.column < 0:
            return inner
        return np.insert(inner, self.column, self.codes[level], axis=1).astype(self.space.dtype)

    def of(self, codes: Codes) -> Index:
        """The level `(n,)` of rows of the whole space; -1 where it is none of those used."""
        if self.column < 0:
            return np.zeros(len(codes), dtype=np.int64)
        at = np.searchsorted(self.codes, codes[:, self.column])
        at = np.minimum(at, self.top)
        out: Index = np.where(np.array(self.codes)[at] == codes[:, self.column], at, -1)
        return out


def _ladder(decision: Decision, eta: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Codes and amounts of the levels used, rising."""
    options = decision.options
    numbers = all(isinstance(o, (int, float)) and not isinstance(o, bool) for o in options)
    if not isinstance(decision, (Integer, Ordinal)) or not numbers or decision.when:
        raise EspalierError(
            f"the fidelity {decision.name!r} must be an ordinal or integer decision of numbers, "
            f"without a condition, got {decision!r}"
        )
    amounts = np.array(options, dtype=float)
    if amounts[0] <= 0 or (np.diff(amounts) <= 0).any():
        raise EspalierError(
            f"the levels of {decision.name!r} must be above 0 and rise, got {list(options)}"
        )
    codes = [len(amounts) - 1]
    while True:
        bound = amounts[codes[-1]] / eta
        whole = bool((amounts == np.floor(amounts)).all())
        bound = np.ceil(bound) if whole else bound * (1 + 1e-9)  # 0.3 / 3 is below 0.1
        below = np.flatnonzero((amounts <= bound) & (amounts < amounts[codes[-1]]))
        if len(below) == 0:
            break
        codes.append(int(below[-1]))
    codes.reverse()
    return tuple(codes), tuple(amounts[codes].tolist())


def _without(space: Space, fidelity: str) -> Space:
    children = [d.name for d in space.decisions if fidelity in d.when]
    ruled = [str(c) for c in space.constraints if fidelity in c.names]
    for others in (children, ruled):
        if others:
            raise EspalierError(
                f"nothing may hang on the fidelity {fidelity!r}, but {others[0]!r} does"
            )
    rest = [d for d in space.decisions if d.name != fidelity]
    if not rest:
        raise EspalierError(f"the space has no decision beside the fidelity {fidelity!r}")
    return Space(rest, space.constraints)
