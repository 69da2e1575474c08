"""Timing of something short: samples long enough for the clock, until the median is certain."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SAMPLE = 100e-6  # seconds a sample lasts at least: 1000 times the clock's resolution
LEAST, MOST = 15, 20_000  # samples


@dataclass(frozen=True)
class Timing:
    """How long one run takes, in milliseconds.

    A sample is the mean of `repeats` runs, so many that it lasts 0.1 ms or more; nothing is
    subtracted. `median_ms`, `p90_ms`, `mean_ms` are over the samples; `spread` is the half-width
    of the median's 95% confidence interval as a share of the median. `load` is how many cores
    other processes used; `stolen` the share of the time in which this process did not run
    (one thread only). `busy` says that the machine was too busy to trust this, `reason` why.
    """

    median_ms: float
    p90_ms: float
    mean_ms: float
    spread: float
    runs: int
    samples: int
    repeats: int
    seconds: float
    load: float = 0.0
    stolen: float = 0.0
    busy: bool = False
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """The timing as plain JSON."""
        return asdict(self)


def clock(
    run: Callable[[], object],
    *,
    precision: float = 0.02,
    seconds: float = 1.0,
    least_seconds: float = 0.0,
    warmup: float = 0.002,
) -> Timing:
    """Times `run` until the median's 95% interval is within `precision`, or for `seconds`.

    `least_seconds` is spent in any case; `warmup` seconds (three runs or more) before that are
    not counted.
    """
    begin = time.perf_counter()
    repeats = _warm(run, warmup)
    samples: list[float] = []
    start, start_cpu = time.perf_counter(), time.process_time()
    check = LEAST
    while True:
        samples.append(_sample(run, repeats))
        elapsed = time.perf_counter() - start
        if len(samples) >= check and elapsed >= least_seconds:
            if spread(np.sort(samples)) <= precision or len(samples) >= MOST:
                break
            check = len(samples) + max(5, len(samples) // 4)
        if elapsed >= seconds and len(samples) >= 3:
            break
    wall = time.perf_counter() - start
    stolen = max(0.0, 1 - (time.process_time() - start_cpu) / wall)
    return _summary(np.sort(samples), repeats, time.perf_counter() - begin, stolen)


def _warm(run: Callable[[], object], seconds: float) -> int:
    """Runs until caches and pools are warm; gives how many runs make a sample."""
    fastest, end, done = math.inf, time.perf_counter() + seconds, 0
    while done < 3 or time.perf_counter() < end:
        fastest = min(fastest, _sample(run, 1))
        done += 1
    return max(1, math.ceil(SAMPLE / max(fastest, 1e-9)))


def _sample(run: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def spread(ordered: NDArray[np.float64]) -> float:
    """Half-width of the 95% interval of the median, as a share of it, from order statistics."""
    n = len(ordered)
    reach = 0.98 * math.sqrt(n)
    low = max(0, math.floor((n - 1) / 2 - reach))
    high = min(n - 1, math.ceil((n - 1) / 2 + reach))
    return float((ordered[high] - ordered[low]) / 2 / max(float(np.median(ordered)), 1e-12))


def _summary(ordered: NDArray[np.float64], repeats: int, seconds: float, stolen: float) -> Timing:
    return Timing(
        median_ms=float(np.median(ordered)) * 1e3,
        p90_ms=float(np.quantile(ordered, 0.9)) * 1e3,
        mean_ms=float(np.mean(ordered)) * 1e3,
        spread=spread(ordered),
        runs=len(ordered) * repeats,
        samples=len(ordered),
        repeats=repeats,
        seconds=seconds,
        stolen=stolen,
    )
