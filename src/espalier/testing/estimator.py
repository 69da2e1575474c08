"""What every estimator must keep; run it on your own: `check_estimator(estimator, candidates)`."""

from __future__ import annotations

import pickle
from collections.abc import Sequence

import numpy as np

from espalier.estimators import Estimator
from espalier.problem import Metrics
from espalier.space import Candidate


def check_estimator(estimator: Estimator, candidates: Sequence[Candidate]) -> None:
    """Raises `AssertionError` with the rule that `estimator` breaks.

    Give two or more different candidates; each is scored about six times.
    """
    given = list(candidates)
    assert len(set(given)) >= 2, "give two or more different candidates"
    assert estimator.metrics, "an estimator declares its metrics"
    all_at_once = estimator.estimate(given)
    _check_columns(estimator, all_at_once, len(given))
    _same(all_at_once, estimator.estimate(given), "the same call gives the same numbers")
    alone = Metrics.concat([estimator.estimate([c]) for c in given])
    _same(all_at_once, alone, "a score does not depend on the batch")
    backwards = estimator.estimate(given[::-1])
    _same(all_at_once, backwards, "a score does not depend on the order", reverse=True)
    doubled = estimator.estimate([given[0], given[1], given[0]])
    for name in doubled:
        assert doubled[name][0] == doubled[name][2], "the same candidate twice has one score"
    copy: Estimator = pickle.loads(pickle.dumps(estimator))
    _same(all_at_once, copy.estimate(given), "a pickled copy gives the same numbers")


def _check_columns(estimator: Estimator, found: Metrics, rows: int) -> None:
    declared = {m.name: m for m in estimator.metrics}
    assert set(found) == set(declared), f"columns are {set(declared)}, got {set(found)}"
    assert found.about == declared, "columns are described as declared"
    assert len(found) == rows, f"a row a candidate: {rows}, got {len(found)}"
    for name in found:
        assert np.isfinite(found[name]).all(), f"{name} is finite"


def _same(a: Metrics, b: Metrics, rule: str, reverse: bool = False) -> None:
    for name in a:
        other = b[name][::-1] if reverse else b[name]
        assert np.array_equal(a[name], other), f"{rule}: {name} was {a[name]}, is {other}"
