"""Whether a strategy, an estimator and a family work together: what a study must do with them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from espalier.costs import Counts
from espalier.estimators import Estimator
from espalier.flows.evaluate import Score
from espalier.nets import Family
from espalier.problem import Limit, Metric, Problem
from espalier.solvers.strategies import Strategy
from espalier.space import Space
from espalier.study import Serial, Study, Trial


def check_search(
    family: Family,
    estimator: Estimator,
    make_strategy: Callable[[Space, int], Strategy],
    trials: int = 6,
    seed: int = 0,
) -> list[Trial]:
    """Runs a small constrained search twice with one seed; asserts what every search promises.

    Every trial is done and has the metrics that estimator and cost declare, keeps the limit, is a
    candidate of the space, and was tried once; the second run is the same. Gives the trials.
    """
    first = _search(family, estimator, make_strategy, trials, seed)
    assert first, "a search must make trials"
    assert len({t.candidate for t in first}) == len(first), "no candidate is tried twice"
    wanted = {m.name for m in (*estimator.metrics, *Counts.metrics)}
    for trial in first:
        assert trial.state == "done", f"{trial.candidate} failed: {trial.error}"
        assert wanted <= set(trial.metrics), f"missing metrics: {wanted - set(trial.metrics)}"
        assert not trial.violation, f"{trial.candidate} breaks the limit and was evaluated"
        family.space.candidate(trial.candidate)
    second = _search(family, estimator, make_strategy, trials, seed)
    assert [(t.candidate, t.metrics) for t in first] == [
        (t.candidate, t.metrics) for t in second
    ], "one seed must give one search"
    return first


def _search(
    family: Family,
    estimator: Estimator,
    make_strategy: Callable[[Space, int], Strategy],
    trials: int,
    seed: int,
) -> list[Trial]:
    counts = Counts(family)
    largest = counts.estimate_codes(family.space.corner(last=True))
    params = Metric("params", "", "min", "counted")
    limit = Limit("params", float(largest["params"][0]))  # keeps the price in play, refuses little
    problem = Problem((estimator.metrics[0], params), (limit,))
    with tempfile.TemporaryDirectory() as folder:
        identity = {"space": family.space.fingerprint}
        with Study.create(Path(folder) / "study", identity, {}, seed) as study:
            return study.search(
                "search",
                problem,
                make_strategy(family.space, seed),
                Score(estimator),
                trials=trials,
                batch=max(trials // 2, 1),
                executor=Serial(),
                price=counts.estimate_codes,
            )
