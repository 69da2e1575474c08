"""Bootstrap intervals: the spread of a figure over seeds or networks, by resampling them.

Efron, "Bootstrap Methods: Another Look at the Jackknife" (Annals of Statistics, 1979); percentile
intervals. The generator is fixed, so the same data give the same interval.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Band(NamedTuple):
    """A mean with the ends of its interval; each a number or an array."""

    mean: Any
    low: Any
    high: Any


def mean_band(samples: Array, level: float = 0.95, resamples: int = 1000, seed: int = 0) -> Band:
    """The mean over the first axis (seeds), with its interval; samples `(s, ...)`.

    With one sample the interval is that sample.
    """
    samples = np.asarray(samples, dtype=float)
    s = len(samples)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(s, np.full(s, 1 / s), size=resamples) / s
    means = np.tensordot(weights, samples, axes=1)
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    return Band(samples.mean(axis=0), low, high)


def interval(
    figure: Callable[..., float],
    *columns: NDArray[Any],
    level: float = 0.95,
    resamples: int = 300,
    seed: int = 0,
) -> tuple[float, float]:
    """The interval of `figure(*columns)` when the rows of the columns `(n,)` are resampled together.

    Resamples whose figure is NaN (all rows alike) are left out; NaN ends where all are.
    """
    n = len(columns[0])
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(resamples):
        rows = rng.integers(n, size=n)
        found.append(figure(*(column[rows] for column in columns)))
    known = np.array(found)[~np.isnan(found)]
    if len(known) == 0:
        return float("nan"), float("nan")
    tail = (1 - level) / 2
    low, high = np.quantile(known, [tail, 1 - tail])
    return float(low), float(high)
