"""How good rows are on a scale from 0 to 1, for strategies that need a reward and not an order."""

from __future__ import annotations

import numpy as np

from espalier.solvers.strategies.population import Array, Index, Population

_SLOPE = 0.05


def weights(objectives: int, rng: np.random.Generator) -> Array:
    """Random weights `(m,)` of the objectives, evenly over those that sum to 1."""
    return rng.dirichlet(np.ones(objectives)) if objectives > 1 else np.ones(objectives)


def merit(population: Population, weight: Array) -> Array:
    """The share of the other rows that each row is ahead of, `(n,)`; rows that tie share it.

    Places do not hang on the objective's scale, and one very bad row does not hide the difference
    between good ones. Rows that break a limit are behind those that keep it, by how much they
    break it. Several objectives are made one: the largest weighted place, and 5% of their sum
    (augmented Tchebycheff, as in ParEGO; Knowles, 2006).
    """
    kept = population.kept
    places = np.zeros(population.values.shape)
    for j, column in enumerate(population.values.T):
        places[kept, j] = _places(np.zeros(int(kept.sum())), column[kept])
    weighted = places * weight
    one = weighted.max(axis=1) + _SLOPE * weighted.sum(axis=1)
    return 1.0 - _places(population.violations, one)


def _places(first: Array, second: Array) -> Array:
    """Places from 0 (lowest) to 1 by `first`, then `second`; ties share their mean; alone: 0.5."""
    n = len(first)
    if n < 2:
        return np.full(n, 0.5)
    order: Index = np.lexsort((second, first))
    a, b = first[order], second[order]
    starts = np.concatenate([[True], (a[1:] != a[:-1]) | (b[1:] != b[:-1])])
    group = np.cumsum(starts) - 1
    mean = np.bincount(group, weights=np.arange(n)) / np.bincount(group)
    out = np.empty(n)
    out[order] = mean[group] / (n - 1)
    return out
