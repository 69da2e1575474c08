"""Whether shared weights rank candidates as training them alone does: measured, not assumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.errors import EspalierError, SpaceError
from espalier.estimators.estimator import Estimator
from espalier.estimators.one_shot import OneShot
from espalier.estimators.trained import Trained
from espalier.space import Candidate, Space
from espalier.tasks import Task
from espalier.train import Recipe

_RESAMPLES = 500
Array = NDArray[np.float64]


def rank_check(
    supernet: Any,
    task: Task,
    candidates: Sequence[Candidate] | int = 12,
    truth: Mapping[Candidate, float] | None = None,
    recipe: Recipe | None = None,
    seed: int = 0,
    estimator: Estimator | None = None,
) -> dict[str, Any]:
    """Rank correlation of one-shot estimates with the truth, over candidates or a number of them.

    `truth` gives each candidate's value of the task's first metric, as a table of trained networks
    does; without it each candidate is built anew and trained alone with `recipe`, which is compared
    on the validation split. `estimator` is the one under test, by default `OneShot` on the
    supernet. All by `seed`: which candidates, if a number is given, and how they are trained.

    Gives `metric`, `n`, `kendall` (tau-b), `kendall_95` (its interval over resampled candidates),
    `spearman`, `candidates`, `estimates`, `truth`; a correlation is None where all values of one
    side are equal. How well orders agree says nothing about candidates unlike those given (Yu et
    al., Evaluating the search phase of NAS, 2020, found low values). Errors: `SpaceError` for fewer
    than 3 candidates; `EspalierError` where the truth lacks one.
    """
    chosen = _chosen(supernet, candidates, seed)
    metric = task.metrics[0].name
    tested = estimator or OneShot(supernet, task, seed=seed)
    estimates = _column(tested, chosen, metric)
    if truth is None:
        real = _column(Trained(supernet, task, recipe or Recipe(), seed), chosen, metric)
    else:
        missing = [c for c in chosen if c not in truth]
        if missing:
            raise EspalierError(
                f"the truth must have a value for every candidate, it has none for {missing[0]}"
            )
        real = np.array([truth[c] for c in chosen], dtype=np.float64)
    return {"metric": metric, "n": len(chosen), **agreement(estimates, real, seed)} | {
        "candidates": [c.to_json() for c in chosen],
        "estimates": estimates.tolist(),
        "truth": real.tolist(),
    }


def _chosen(supernet: Any, candidates: Sequence[Candidate] | int, seed: int) -> list[Candidate]:
    """Different candidates: those given, or that many drawn."""
    if isinstance(candidates, int):
        space: Space = supernet.space
        codes = space.sample(20 * candidates, np.random.default_rng(seed))
        found = space.decode(codes[space.unique(codes)][:candidates])
    else:
        found = list(dict.fromkeys(candidates))
    if len(found) < 3:
        raise SpaceError(
            f"a rank correlation needs 3 different candidates or more, got {len(found)}"
        )
    return found


def _column(estimator: Estimator, candidates: Sequence[Candidate], metric: str) -> Array:
    return np.asarray(estimator.estimate(candidates)[metric], dtype=np.float64)


def agreement(estimates: Array, truth: Array, seed: int = 0) -> dict[str, Any]:
    """How well two columns `(n,)` order alike: `kendall`, `kendall_95` and `spearman`, as above."""
    from scipy.stats import kendalltau, spearmanr

    tau, rho = None, None
    if np.ptp(estimates) > 0 and np.ptp(truth) > 0:
        tau = float(kendalltau(estimates, truth).statistic)
        rho = float(spearmanr(estimates, truth).statistic)
    return {"kendall": tau, "kendall_95": _interval(estimates, truth, seed), "spearman": rho}


def _interval(estimates: Array, truth: Array, seed: int) -> list[float] | None:
    """The middle 95% of tau over candidates drawn with replacement (percentile bootstrap)."""
    rng = np.random.default_rng([seed, len(truth)])
    first, second = (np.sign(x[:, None] - x[None, :]) for x in (estimates, truth))
    taus = []
    for rows in rng.integers(len(truth), size=(_RESAMPLES, len(truth))):
        a, b = first[np.ix_(rows, rows)], second[np.ix_(rows, rows)]
        untied = np.sqrt(np.abs(a).sum() * np.abs(b).sum())
        if untied > 0:
            taus.append(float((a * b).sum() / untied))
    return [float(q) for q in np.quantile(taus, (0.025, 0.975))] if taus else None
