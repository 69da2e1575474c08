"""How well an estimator orders networks, by the criteria that matter for a search.

Ning et al., "Evaluating Efficient Performance Estimators of Neural Architectures" (NeurIPS 2021),
https://arxiv.org/abs/2008.03064. Scores and truth are better when larger. A share `k` counts networks
as a part of all: 0.05 is the best 5%; a whole number is a count. Ties in scores are broken at random,
always in the same way, so that the order of the table helps no estimator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.bench.bootstrap import interval

Array = NDArray[np.float64]
Index = NDArray[np.int64]
SHARES = (0.01, 0.05, 0.10, 0.5)


def kendall(scores: Array, truth: Array) -> float:
    """Kendall's tau-b: concordant less discordant pairs, ties accounted for."""
    from scipy.stats import kendalltau

    return float(kendalltau(scores, truth).statistic)


def spearman(scores: Array, truth: Array) -> float:
    """Spearman's rank correlation; NaN where one of them is constant."""
    from scipy.stats import rankdata

    a, b = rankdata(scores), rankdata(truth)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def places(values: Array) -> Index:
    """The place `(n,)` of each value, 0 for the largest; ties broken at random, always alike."""
    shuffled = np.random.default_rng(0).permutation(len(values))
    order = shuffled[np.argsort(-np.asarray(values, dtype=float)[shuffled], kind="stable")]
    out = np.empty(len(values), dtype=np.int64)
    out[order] = np.arange(len(values))
    return out


def count(k: float, n: int) -> int:
    """How many of n networks `k` means: a share below 1, or a count; at least 1, at most n."""
    if k <= 0:
        raise ValueError(f"k is a share below 1 or a whole number from 1, got {k!r}")
    return min(max(round(k * n) if k < 1 else int(k), 1), n)


def precision(scores: Array, truth: Array, k: float) -> float:
    """P@top k: the share of the k best by score that are among the k truly best."""
    n = count(k, len(scores))
    return float((places(truth)[places(scores) < n] < n).mean())


def precision_bottom(scores: Array, truth: Array, k: float) -> float:
    """P@bottom k: the share of the k worst by score that are among the k truly worst."""
    return precision(-np.asarray(scores), -np.asarray(truth), k)


def best_rank(scores: Array, truth: Array, k: float) -> float:
    """BR@k: the best true rank among the k best by score, from 1/n (the best) to 1 (the worst)."""
    n = count(k, len(scores))
    return float((places(truth)[places(scores) < n].min() + 1) / len(scores))


def worst_rank(scores: Array, truth: Array, k: float) -> float:
    """WR@k: the worst true rank among the k best by score, from 1/n to 1."""
    n = count(k, len(scores))
    return float((places(truth)[places(scores) < n].max() + 1) / len(scores))


def rank_gap(scores: Array, truth: Array) -> Array:
    """How much too high each network is placed `(n,)`, as a share of all: above 0 it is
    overestimated, below 0 underestimated. The mean is 0."""
    return (places(truth) - places(scores)) / len(scores)


def bias_by_complexity(
    scores: Array, truth: Array, complexity: Array, groups: int = 5
) -> list[dict[str, float]]:
    """Groups of networks from small to large: their complexity, the mean rank gap, tau inside.

    Groups are of equal size by rank of complexity; networks of equal complexity stay together.
    """
    gap = rank_gap(scores, truth)
    cuts = np.quantile(complexity, np.linspace(0, 1, groups + 1)[1:-1])
    group = np.searchsorted(cuts, complexity, side="left")
    out = []
    for g in np.unique(group):
        rows = group == g
        out.append(
            {
                "low": float(complexity[rows].min()),
                "high": float(complexity[rows].max()),
                "networks": int(rows.sum()),
                "gap": float(gap[rows].mean()),
                "kendall": kendall(scores[rows], truth[rows]),
            }
        )
    return out


def bias_by_operator(
    scores: Array, truth: Array, operators: Mapping[str, Array]
) -> dict[str, dict[str, float]]:
    """For each operator, its counts `(n,)`: the slope of the rank gap in the count (the share of all
    places that one more of it lifts a network above its true place), and their correlation."""
    gap = rank_gap(scores, truth)
    out = {}
    for name, counts in operators.items():
        x = np.asarray(counts, dtype=float)
        spread = x.var()
        if spread == 0:
            continue
        covariance = float(((x - x.mean()) * (gap - gap.mean())).mean())
        out[name] = {
            "slope": covariance / spread,
            "correlation": covariance / float(np.sqrt(spread) * gap.std() or 1.0),
        }
    return out


def operator_counts(space: Any, codes: NDArray[Any]) -> dict[str, Array]:
    """How often each option is taken in each row, options of one name together."""
    active = space.active(codes)
    out: dict[str, Array] = {}
    for j, decision in enumerate(space.decisions):
        for i, option in enumerate(decision.options):
            taken = (codes[:, j] == i) & active[:, j]
            name = str(option)
            out[name] = out.get(name, np.zeros(len(codes))) + taken
    return out


def criteria(
    scores: Array,
    truth: Array,
    *,
    complexity: Array | None = None,
    operators: Mapping[str, Array] | None = None,
    shares: Sequence[float] = SHARES,
    resamples: int = 300,
    seed: int = 0,
) -> dict[str, Any]:
    """The whole report of one estimator, as plain JSON: each figure with its bootstrap interval.

    `scores` and `truth` `(n,)`, better when larger; rows where either is NaN are left out and
    counted. `complexity` `(n,)` such as parameters; `operators` name to counts `(n,)`.
    """
    known = ~(np.isnan(scores) | np.isnan(truth))
    s, t = np.asarray(scores, dtype=float)[known], np.asarray(truth, dtype=float)[known]

    def figure(of: Callable[..., float]) -> dict[str, Any]:
        low, high = interval(of, s, t, resamples=resamples, seed=seed)
        return {"value": of(s, t), "low": low, "high": high}

    out: dict[str, Any] = {
        "networks": len(s),
        "without_score": int((~known).sum()),
        "kendall": figure(kendall),
        "spearman": figure(spearman),
    }
    for name, of in (
        ("precision", precision),
        ("precision_bottom", precision_bottom),
        ("best_rank", best_rank),
        ("worst_rank", worst_rank),
    ):
        out[name] = {f"{k:g}": figure(lambda a, b, of=of, k=k: of(a, b, k)) for k in shares}
    if complexity is not None:
        out["by_complexity"] = bias_by_complexity(s, t, np.asarray(complexity)[known])
    if operators is not None:
        kept = {name: np.asarray(counts)[known] for name, counts in operators.items()}
        out["by_operator"] = bias_by_operator(s, t, kept)
    return out
