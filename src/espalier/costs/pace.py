"""Timings at one pace, on a machine that does not keep its own.

On shared machines everything runs up to twice as long for seconds or minutes, as neighbours come and
go, and medians do not see that. So one small network is timed beside all that is timed: what ran while
that took longer, or shorter, than at first is turned into what it would have taken then.
"""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from espalier.costs.runtime import OnnxRuntime
from espalier.costs.timing import Timing
from espalier.export import to_onnx

STEADY = 0.06  # smaller changes of pace are taken for noise
_FRESH = 0.3  # seconds for which a pace once taken holds
TRIES = 3


class Pace:
    """Times models on a runtime, all at the pace of the first timing.

    `corrected` counts the timings that were taken at another pace.
    """

    def __init__(self, runtime: OnnxRuntime) -> None:
        self._runtime = runtime
        self._example = runtime.batched(torch.zeros(1, 16, 12, 12))
        with torch.random.fork_rng(devices=[]):
            layers = [nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.ReLU()]
        self._reference = to_onnx(nn.Sequential(*layers), self._example, fast=True)
        self._first = min(self._timed() for _ in range(3))
        self._last, self._when = 1.0, time.perf_counter()
        self._met: list[float] = []
        self.corrected = 0

    @property
    def best(self) -> float:
        """The pace of the machine's best tenth of the time, relative to the first; 1 where it
        kept its pace. Timings divided by it are what the machine can do."""
        best = float(np.quantile(self._met, 0.9)) if self._met else 1.0
        return best if best > 1 + STEADY else 1.0

    def quick(
        self, model: bytes, x: Tensor, least_seconds: float = 0.0, tries: int = TRIES
    ) -> Timing:
        """`OnnxRuntime.quick`, at the pace of the first timing; again, up to so many tries, where the
        pace changed meanwhile."""
        for _ in range(tries):
            fresh = time.perf_counter() - self._when < _FRESH
            before = self._last if fresh else self.now()
            timing = self._runtime.quick(model, x, least_seconds=least_seconds)
            after = self.now()
            if abs(after / before - 1) <= STEADY:  # otherwise it changed in between: once more
                break
        pace = (before + after) / 2
        if abs(pace - 1) <= STEADY:
            return timing
        self.corrected += 1
        return replace(timing, median_ms=timing.median_ms * pace)

    def now(self) -> float:
        """The machine's pace, relative to the first timing's: 0.5 is half as fast."""
        self._last = self._first / self._timed()
        self._when = time.perf_counter()
        self._met.append(self._last)
        return self._last

    def _timed(self) -> float:
        return self._runtime.quick(self._reference, self._example).median_ms
