"""Factors: tables over the options of a few decisions, whose sum is a harm or a cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.errors import SpaceError, unknown
from espalier.space import Real, Space

Array = NDArray[np.float64]
Codes = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Factor:
    """A number for every combination of the options of some decisions.

    `values` has an axis for each of `decisions`, in the order of their options; without decisions
    it is one number that always counts. A decision that is inactive stands at its first option, as
    in canonical codes. `inf` forbids a combination. A sum of factors is a harm or a cost; with
    `peak` the cost is at least each of these values, and they are not summed. `name` says what it
    is of: a layer.
    """

    decisions: tuple[str, ...]
    values: Array
    peak: bool = False
    name: str = ""

    def __post_init__(self) -> None:
        values = np.asarray(self.values, dtype=np.float64)
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "decisions", tuple(self.decisions))
        if values.ndim != len(self.decisions):
            rule = f"a factor has an axis a decision: {len(self.decisions)} for {self.decisions}"
            raise SpaceError(f"{rule}, got an array of shape {values.shape}")
        if np.isnan(values).any() or np.isneginf(values).any():
            raise SpaceError(
                f"a factor's values are numbers or inf, got NaN or -inf in that of {self.decisions}"
            )

    def at(self, space: Space, codes: Codes) -> Array:
        """The values `(n,)` for canonical codes `(n, d)`."""
        where = self._columns(space)
        if not where:
            return np.full(len(codes), float(self.values))
        found: Array = self.values[tuple(codes[:, j].astype(np.intp) for j in where)]
        return found

    def check(self, space: Space) -> None:
        """Errors: `SpaceError` where a decision is unknown or its options are not as many."""
        counts = tuple(space.decisions[j].count for j in self._columns(space))
        if counts != self.values.shape:
            rule = f"the factor of {self.decisions} needs the shape {counts}, an entry an option"
            raise SpaceError(f"{rule}, got {self.values.shape}")

    def _columns(self, space: Space) -> list[int]:
        return columns(space, self.decisions)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; a forbidden combination is null."""
        flat = [v if math.isfinite(v) else None for v in self.values.ravel().tolist()]
        out: dict[str, Any] = {"decisions": list(self.decisions), "values": flat}
        out["shape"] = list(self.values.shape)
        return (
            out | ({"peak": True} if self.peak else {}) | ({"name": self.name} if self.name else {})
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Factor:
        """The factor that `to_json` wrote."""
        flat = np.array([math.inf if v is None else v for v in data["values"]], dtype=np.float64)
        values = flat.reshape(data["shape"])
        return cls(tuple(data["decisions"]), values, data.get("peak", False), data.get("name", ""))


def columns(space: Space, names: Sequence[str]) -> list[int]:
    """The columns of decisions. Errors: `SpaceError` for unknown, repeated or real ones."""
    index = {name: j for j, name in enumerate(space.names)}
    for name in names:
        if name not in index:
            raise SpaceError(unknown("decision", name, space.names))
        if isinstance(space[name], Real):
            raise SpaceError(f"a factor is over listed options, and {name!r} is a real decision")
    if len(set(names)) != len(names):
        raise SpaceError(f"a factor names each decision once, got {tuple(names)}")
    return [index[name] for name in names]


def totals(space: Space, factors: Iterable[Factor], codes: Codes) -> Array:
    """What factors give together `(n,)` for codes `(n, d)`: their sum, and at least each peak."""
    codes = space.canonical(codes)
    summed, peak = np.zeros(len(codes)), np.full(len(codes), -np.inf)
    for factor in factors:
        if factor.peak:
            np.maximum(peak, factor.at(space, codes), out=peak)
        else:
            summed += factor.at(space, codes)
    out: Array = np.maximum(summed, peak)
    return out


def exact(space: Space, factors: Iterable[Factor], row: Codes) -> float:
    """What factors give together for one canonical row `(1, d)`, the sum rounded only once."""
    found = [(f.peak, float(f.at(space, row)[0])) for f in factors]
    summed = math.fsum(v for peak, v in found if not peak)
    return max([summed, *(v for peak, v in found if peak)])
