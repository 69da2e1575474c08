"""Checks that any cost must pass: `check_cost(Counts(family), candidates)`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from espalier.costs import CodeCost, Cost
from espalier.problem import Metrics
from espalier.space import Candidate

_KINDS = {"counted", "predicted", "estimated", "measured"}
_EXACT = {"counted", "predicted"}


def check_cost(cost: Cost, candidates: Sequence[Candidate]) -> None:
    """Raises `AssertionError` with the rule broken. Give two candidates or more.

    A cost gives the metrics that it declares, finite and not negative, a row a candidate, and no
    rows for no candidates. What is counted or predicted is exactly the same when asked again, in
    another order, or one by one. torch's random generator is left as it was.
    """
    assert len(candidates) >= 2, "give at least two candidates"
    _check_declared(cost)
    state = torch.get_rng_state()
    found = cost.estimate(candidates)
    assert torch.equal(state, torch.get_rng_state()), "a cost leaves torch's generator as it was"
    _check_columns(cost, found, len(candidates))
    assert len(cost.estimate([])) == 0, "no candidates give no rows"
    _check_columns(cost, cost.estimate(candidates[:1]), 1)
    again = cost.estimate(candidates)
    turned = cost.estimate(list(reversed(candidates)))
    alone = Metrics.concat([cost.estimate([candidate]) for candidate in candidates])
    for metric in cost.metrics:
        if metric.how not in _EXACT:
            continue
        name, values = metric.name, found[metric.name]
        assert np.array_equal(values, again[name]), f"{name}: asked twice, the numbers differ"
        assert np.array_equal(values, turned[name][::-1]), f"{name} depends on the order"
        assert np.array_equal(values, alone[name]), f"{name} depends on what else is in the batch"
    if isinstance(cost, CodeCost):
        _check_codes(cost, candidates, found)


def _check_declared(cost: Cost) -> None:
    assert cost.metrics, "a cost declares its metrics"
    names = [metric.name for metric in cost.metrics]
    assert len(set(names)) == len(names), f"metrics have different names, got {names}"
    for metric in cost.metrics:
        assert metric.goal == "min", f"{metric.name}: a cost is better when it is less"
        assert metric.how in _KINDS, f"{metric.name}: how is {metric.how!r}, not one of {_KINDS}"


def _check_columns(cost: Cost, found: Metrics, rows: int) -> None:
    declared = {metric.name: metric for metric in cost.metrics}
    assert found.about == declared, f"declared are {declared}, given are {found.about}"
    assert len(found) == rows, f"{rows} candidates must give {rows} rows, got {len(found)}"
    for name in found:
        assert np.isfinite(found[name]).all(), f"{name} must be finite, got {found[name]}"
        assert (found[name] >= 0).all(), f"{name} must not be negative, got {found[name]}"


def _check_codes(cost: CodeCost, candidates: Sequence[Candidate], found: Metrics) -> None:
    codes = np.asarray(cost.space.encode(candidates))
    before = codes.copy()
    coded = cost.estimate_codes(codes)
    assert np.array_equal(codes, before), "codes given are not changed"
    for metric in cost.metrics:
        if metric.how in _EXACT:
            same = np.array_equal(coded[metric.name], found[metric.name])
            assert same, f"{metric.name}: codes and candidates give different numbers"
