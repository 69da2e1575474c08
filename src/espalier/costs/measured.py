"""Measured latency as a cost: every candidate is built, exported and timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from espalier.costs.cost import Builder, Cost
from espalier.costs.pieces import unseeded
from espalier.costs.runtime import OnnxRuntime
from espalier.costs.timing import Timing
from espalier.problem import Metric, Metrics
from espalier.space import Candidate


class MeasuredLatency(Cost):
    """Milliseconds of one run on the runtime; the spread is the half-width of the median's 95%
    interval. Takes about 0.3 s a candidate; a candidate is measured once for each object.

    `note` is told when a timing can't be trusted, with the candidate and the reason.
    """

    metrics = (Metric("latency_ms", "ms", "min", "measured"),)

    def __init__(
        self,
        family: Builder,
        runtime: OnnxRuntime | None = None,
        note: Callable[[str], None] | None = None,
    ) -> None:
        self.family = family
        self.runtime = runtime or OnnxRuntime()
        self.note = note
        self._known: dict[Candidate, Timing] = {}

    def estimate(self, candidates: Sequence[Candidate]) -> Metrics:
        """The latency of each candidate. Errors: `ExportError`; `BusyMachine` when strict."""
        timings = [self.timing(candidate) for candidate in candidates]
        medians = np.array([t.median_ms for t in timings])
        spreads = np.array([t.median_ms * t.spread for t in timings])
        return Metrics({"latency_ms": medians}, self.metrics, {"latency_ms": spreads})

    def timing(self, candidate: Candidate) -> Timing:
        """The whole timing of one candidate."""
        if candidate not in self._known:
            with unseeded():
                network = self.family.build(candidate)
            timing = self.runtime.measure(network, self.family.example(self.runtime.batch))
            if timing.busy and self.note is not None:
                self.note(f"{candidate}: {timing.reason}")
            self._known[candidate] = timing
        return self._known[candidate]
