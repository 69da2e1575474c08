"""Relative improvement over the average random architecture, in per cent.

Yang, Esperanca & Carlucci, "NAS evaluation is frustratingly hard" (ICLR 2020),
https://arxiv.org/abs/1912.12522: RI = 100 (accuracy of the method - accuracy of random) / accuracy of
random, where random is the average of architectures drawn at random, none chosen. For metrics to be
minimised the sign is turned, so that more is always better.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from espalier.bench.bootstrap import Band

Array = NDArray[np.float64]
_EXACT = 2000
LEAST = 8  # architectures that the random average stands on, as in the paper


def relative_improvement(found: ArrayLike, random: ArrayLike, maximised: bool = True) -> Any:
    """RI in per cent of test results `found` over the mean of `random` architectures' results."""
    base = np.mean(np.asarray(random, dtype=float), axis=-1)
    gain = np.asarray(found, dtype=float) - base
    return 100.0 * (gain if maximised else -gain) / np.abs(base)


def improvement(
    found: ArrayLike,
    random: ArrayLike,
    maximised: bool = True,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Band:
    """RI of the mean of `found` `(s,)` over the mean of `random` `(r,)`, both resampled."""
    f, r = np.asarray(found, dtype=float), np.asarray(random, dtype=float)
    if len(r) < LEAST:
        raise ValueError(f"the random average stands on at least {LEAST} results, got {len(r)}")
    rng = np.random.default_rng(seed)
    means = []
    for x in (f, r):
        if len(x) > _EXACT:  # all networks of a table: their mean is no estimate
            means.append(np.full(resamples, x.mean()))
            continue
        weights = rng.multinomial(len(x), np.full(len(x), 1 / len(x)), size=resamples) / len(x)
        means.append(weights @ x)
    drawn = relative_improvement(means[0], means[1][:, None], maximised)
    tail = (1 - level) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Band(float(relative_improvement(f.mean(), r, maximised)), float(low), float(high))
