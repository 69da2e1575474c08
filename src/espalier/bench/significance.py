"""Whether differences between strategies are more than luck: ranks, and paired tests.

Demsar, "Statistical Comparisons of Classifiers over Multiple Data Sets" (JMLR 2006): Friedman's test
and Nemenyi's critical difference on mean ranks. Against the baseline: a paired sign-flip permutation
test on the mean, two-sided, adjusted by Holm (1979). A block is a seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
ALPHA = 0.05
_RESAMPLES = 9999


@dataclass(frozen=True)
class Ranks:
    """Mean rank of each strategy (1 best), Friedman's p, and Nemenyi's critical difference: mean
    ranks nearer than that are not told apart. NaN where there are too few seeds or strategies."""

    mean: dict[str, float]
    p: float
    critical: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; NaN is None."""
        return {
            "mean": self.mean,
            "friedman_p": None if np.isnan(self.p) else self.p,
            "critical_difference": None if np.isnan(self.critical) else self.critical,
        }


def ranks(losses: Mapping[str, Array]) -> Ranks:
    """Ranks of strategies by losses `(s,)` of the same seeds, ties shared."""
    from scipy.stats import friedmanchisquare, rankdata, studentized_range

    names = list(losses)
    table = np.stack([losses[name] for name in names], axis=1)
    each = rankdata(table, axis=1)
    mean = {name: float(r) for name, r in zip(names, each.mean(axis=0), strict=True)}
    s, k = table.shape
    p = critical = float("nan")
    if k >= 3 and s >= 2 and (np.ptp(each, axis=1) > 0).any():
        p = float(friedmanchisquare(*table.T).pvalue)
    if k >= 2 and s >= 2:
        q = float(studentized_range.ppf(1 - ALPHA, k, np.inf))
        critical = q / np.sqrt(2) * np.sqrt(k * (k + 1) / (6 * s))
    return Ranks(mean, p, float(critical))


def paired(a: Array, b: Array, seed: int = 0, resamples: int = _RESAMPLES) -> float:
    """Two-sided p of the mean of a - b `(s,)` being 0: signs flipped, all ways where they are few.

    The p of random flips is (1 + as extreme) / (1 + flips), so it is never 0.
    """
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    s = len(difference)
    observed = abs(difference.sum()) * (1 - 1e-12)
    if 2**s <= resamples + 1:
        bits = (np.arange(2**s)[:, None] >> np.arange(s)) & 1
        return float((abs((2 * bits - 1) @ difference) >= observed).mean())
    rng = np.random.default_rng(seed)
    signs = rng.integers(0, 2, size=(resamples, s), dtype=np.int8) * 2 - 1
    return float((1 + (abs(signs @ difference) >= observed).sum()) / (1 + resamples))


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """p-values adjusted for their number: Holm's step-down, never above 1."""
    order = sorted(p, key=lambda name: p[name])
    out, least = {}, 0.0
    for i, name in enumerate(order):
        least = max(least, min(1.0, p[name] * (len(order) - i)))
        out[name] = least
    return {name: out[name] for name in p}
