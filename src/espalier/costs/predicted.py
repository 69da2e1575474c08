"""Predicted latency: a table of measured pieces, an overhead and a scale, calibrated here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.costs.calibration import Calibration, Progress, Sums
from espalier.costs.cost import Builder, CodeCost
from espalier.costs.pieces import Terms, pieces_of
from espalier.costs.runtime import OnnxRuntime
from espalier.costs.table import Table
from espalier.errors import EspalierError
from espalier.problem import Metric, Metrics


class PredictedLatency(CodeCost):
    """Milliseconds of one run, predicted as `overhead + scale * sum of the network's pieces`.

    Calibrate it on the machine first, or give it a table that was. Each distinct piece (a unit of
    the family with its input's shape) is exported and timed on the runtime behind a lead-in, less
    the time of the lead-in alone; pieces that were not measured are filled in by a regression over
    their work.
    Overhead and scale are fitted on whole networks, the error is stated on others.
    A lookup table of blocks as in ProxylessNAS (Cai et al., 2019) and Once-for-All (2020).
    """

    metrics = (Metric("latency_ms", "ms", "min", "predicted"),)

    def __init__(self, family: Builder, runtime: OnnxRuntime | None = None) -> None:
        self.family = family
        self.space = family.space
        self.runtime = runtime or OnnxRuntime()
        self._pieces = pieces_of(family)
        self._table: Table | None = None
        self._sums: Sums | None = None

    def calibrate(
        self,
        seed: int = 0,
        progress: Progress | None = None,
        limit: int = 250,
        seconds: float = math.inf,
    ) -> dict[str, Any]:
        """Measures the table, fits it, and gives it as JSON; then codes can be priced.

        At most `limit` pieces are measured, and no more when `seconds` are spent (but a few of each
        kind of layer). `progress(done, total, text)` is told how far it is.
        Errors: `BusyMachine` when the runtime is strict, `ExportError`.
        """
        table = Calibration(
            self._pieces, self.runtime, seed, progress, limit=limit, seconds=seconds
        ).run()
        self._use(table)
        return table.to_json()

    @classmethod
    def from_json(
        cls, family: Builder, runtime: OnnxRuntime | None, table: Mapping[str, Any]
    ) -> PredictedLatency:
        """The predictor of a table that `calibrate` gave.

        Errors: `DataError` when it is not one, or one of another space, device, threads or batch.
        """
        made = cls(family, runtime)
        read = Table.from_json(table)
        read.check(made.runtime.about(), made.space.fingerprint)
        made._use(read)
        return made

    def _use(self, table: Table) -> None:
        times = {key: float(entry["ms"]) for key, entry in table.pieces.items()}
        work = {key: tuple(entry["work"]) for key, entry in table.pieces.items()}
        self._table, self._sums = table, Sums(self._pieces, times, work, table.filler)

    def to_json(self) -> dict[str, Any]:
        """The table as plain JSON. Errors: `EspalierError` before calibration."""
        return self._calibrated().to_json()

    @property
    def error(self) -> dict[str, Any]:
        """How well held-out networks are predicted: spearman, within_10_percent, held_out (each
        with candidate, predicted and measured), overhead_ms, scale, units, seconds, load, busy."""
        return self._calibrated().error

    def _calibrated(self) -> Table:
        if self._table is None:
            raise EspalierError(
                "the latency predictor has no table yet: call calibrate(), or make it with "
                "from_json(family, runtime, table)"
            )
        return self._table

    def estimate_codes(self, codes: NDArray[Any]) -> Metrics:
        """Predicted milliseconds of codes `(n, d)`. Errors: `EspalierError` before calibration."""
        table = self._calibrated()
        assert self._sums is not None
        total = table.overhead_ms + table.scale * self._sums(codes)
        return Metrics({"latency_ms": np.asarray(total)}, self.metrics)

    def terms(self, metric: str) -> Terms:
        """The scaled milliseconds of each piece; the overhead is the constant."""
        table, sums = self._calibrated(), self._sums
        assert sums is not None
        return Terms(self._pieces, lambda p: table.scale * sums.of(p), table.overhead_ms)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._table is None:
            return PredictedLatency, (self.family, self.runtime)
        return PredictedLatency.from_json, (self.family, self.runtime, self.to_json())
