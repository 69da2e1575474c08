"""Rows that a strategy remembers: what was tried and how it did; and how arrays become JSON."""

from __future__ import annotations

import base64
import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.problem import crowding, ranks

Codes = NDArray[Any]
Array = NDArray[np.float64]
Index = NDArray[np.int64]


@dataclass(frozen=True)
class Population:
    """Codes `(n, d)` with values `(n, m)`, minimised, and violations `(n,)`; oldest row first.

    A row that failed (a value is NaN although no limit is broken) counts as the worst violation,
    so that every order below puts it last.
    """

    codes: Codes
    values: Array
    violations: Array

    @classmethod
    def told(cls, codes: Codes, values: Array, violations: Array) -> Population:
        """Rows as `Strategy.tell` gets them."""
        values = np.asarray(values, dtype=float).reshape(len(codes), -1)
        broken = np.asarray(violations, dtype=float)
        unknown = np.isnan(values).any(axis=1)
        # a NaN violation is unknown too; and comparing with it is false
        lost = np.isnan(broken) | (unknown & (broken <= 0))
        return cls(np.asarray(codes), values, np.where(lost, np.inf, np.maximum(broken, 0.0)))

    def __len__(self) -> int:
        return len(self.codes)

    def take(self, rows: Index) -> Population:
        """Some rows, in the order given."""
        return Population(self.codes[rows], self.values[rows], self.violations[rows])

    def join(self, younger: Population) -> Population:
        """These rows and then the younger ones."""
        if len(self) == 0:
            return younger
        return Population(
            np.concatenate([self.codes, younger.codes]),
            np.concatenate([self.values, younger.values]),
            np.concatenate([self.violations, younger.violations]),
        )

    @property
    def kept(self) -> NDArray[np.bool_]:
        """Which rows were evaluated and keep every limit."""
        return self.violations <= 0

    @cached_property
    def best_first(self) -> Index:
        """All rows, best first: by constraint domination, then by crowding (Deb et al., 2002).

        With one objective this is the order of its values. Equal rows stay in order of age.
        """
        if self.values.shape[1] == 1:
            values = np.where(self.violations > 0, 0.0, self.values[:, 0])
            return np.lexsort((values, self.violations))
        rank = ranks(self.values, self.violations)
        crowd = np.zeros(len(self))
        for level in np.unique(rank[self.kept]):
            rows = np.flatnonzero(rank == level)
            crowd[rows] = crowding(self.values[rows])
        return np.lexsort((-crowd, rank)).astype(np.int64)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, exact."""
        return {
            "codes": pack(self.codes),
            "values": pack(self.values),
            "violations": pack(self.violations),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Population:
        """The population that `to_json` wrote."""
        return cls(unpack(data["codes"]), unpack(data["values"]), unpack(data["violations"]))


def pack(array: NDArray[Any]) -> dict[str, Any]:
    """An array of numbers as compact JSON: dtype, shape and deflated bytes. Keeps NaN and inf."""
    plain = np.ascontiguousarray(array)
    little = plain.astype(plain.dtype.newbyteorder("<"), copy=False)
    text = base64.b64encode(zlib.compress(little.tobytes(), 1)).decode("ascii")
    return {"dtype": little.dtype.str, "shape": list(plain.shape), "data": text}


def unpack(data: dict[str, Any]) -> NDArray[Any]:
    """The array that `pack` wrote. Only numbers: other dtypes are refused."""
    dtype = np.dtype(data["dtype"])
    if dtype.kind not in "iufb":
        raise ValueError(f"a packed array holds numbers, got dtype {data['dtype']!r}")
    raw = zlib.decompress(base64.b64decode(data["data"]))
    native = np.frombuffer(raw, dtype=dtype).astype(dtype.newbyteorder("="))
    return native.reshape(data["shape"])
