"""Counted costs of candidates: exact, and for whole arrays of codes at once."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.costs.cost import Builder, CodeCost
from espalier.costs.pieces import Terms, pieces_of
from espalier.problem import Metric, Metrics

_SUMMED = ("params", "macs", "bytes")


class Counts(CodeCost):
    """Parameters, multiply-accumulates, peak activation bytes and weight bytes: see `costs.Count`.

    A family with units is counted from a table of its units, each counted once: parameters,
    multiply-accumulates and bytes add up, and the peak is the largest of the units', because
    between two units of a chain only one tensor is alive. Other families' networks are built and
    counted, each once.
    """

    metrics = (
        Metric("params"),
        Metric("macs"),
        Metric("activation_bytes", "B"),
        Metric("bytes", "B"),
    )

    def __init__(self, family: Builder) -> None:
        self.family = family
        self.space = family.space
        self._pieces = pieces_of(family)

    def __reduce__(self) -> tuple[Any, ...]:
        return Counts, (self.family,)  # tables are made again where they are needed

    def estimate_codes(self, codes: NDArray[Any]) -> Metrics:
        """The counts of codes `(n, d)`; the first time a unit is met it is built and counted."""
        totals = {metric.name: np.zeros(len(codes)) for metric in self.metrics}
        for part in self._pieces.parts(codes):
            for name, total in totals.items():
                of = np.array([getattr(p.count, name) for p in part.pieces], dtype=float)
                values = part.values(of)
                if name in _SUMMED:
                    total += values
                else:
                    np.maximum(total, values, out=total)
        return Metrics(totals, self.metrics)

    def terms(self, metric: str) -> Terms:
        """The cost of each piece, from which those of networks follow."""
        return Terms(
            self._pieces, lambda p: float(getattr(p.count, metric)), peak=metric not in _SUMMED
        )
