"""The criteria for estimators, against definitions written out and against closed forms."""

from __future__ import annotations

import json

import numpy as np
import pytest

from espalier.bench import criteria
from espalier.bench.bootstrap import interval
from espalier.space import Space, choice

RNG = np.random.default_rng(0)
TRUTH = RNG.normal(size=120)
SCORES = TRUTH + RNG.normal(size=120)


def test_kendall_by_counting_pairs_with_ties() -> None:
    a = np.array([1.0, 2, 2, 3, 5, 4])
    b = np.array([1.0, 3, 2, 2, 6, 6])
    up = down = tie_a = tie_b = 0
    for i in range(6):
        for j in range(i):
            x, y = np.sign(a[i] - a[j]), np.sign(b[i] - b[j])
            up += x * y > 0
            down += x * y < 0
            tie_a += x == 0 and y != 0
            tie_b += y == 0 and x != 0
    expected = (up - down) / np.sqrt((up + down + tie_a) * (up + down + tie_b))
    assert criteria.kendall(a, b) == pytest.approx(expected)


def test_spearman_of_distinct_values_by_the_closed_form() -> None:
    n = len(TRUTH)
    d = criteria.places(SCORES) - criteria.places(TRUTH)
    expected = 1 - 6 * float((d.astype(float) ** 2).sum()) / (n * (n**2 - 1))
    assert criteria.spearman(SCORES, TRUTH) == pytest.approx(expected)
    assert np.isnan(criteria.spearman(np.ones(5), np.arange(5.0)))


@pytest.mark.parametrize("k", [0.05, 0.1, 0.5, 1, 7])
def test_precision_and_ranks_at_k_as_defined(k: float) -> None:
    n = criteria.count(k, 120)
    top = set(np.argsort(-SCORES)[:n].tolist())
    best = np.argsort(-TRUTH).tolist()
    assert criteria.precision(SCORES, TRUTH, k) == len(top & set(best[:n])) / n
    ranks = [best.index(i) + 1 for i in top]
    assert criteria.best_rank(SCORES, TRUTH, k) == min(ranks) / 120
    assert criteria.worst_rank(SCORES, TRUTH, k) == max(ranks) / 120
    bottom = set(np.argsort(SCORES)[:n].tolist())
    assert criteria.precision_bottom(SCORES, TRUTH, k) == len(bottom & set(best[-n:])) / n


def test_a_perfect_and_a_reversed_estimator() -> None:
    for k in (0.05, 0.5):
        assert criteria.precision(TRUTH, TRUTH, k) == 1
        assert criteria.best_rank(TRUTH, TRUTH, k) == 1 / 120
        assert criteria.best_rank(-TRUTH, TRUTH, 0.05) > 0.9
    assert criteria.precision(-TRUTH, TRUTH, 0.5) == 0


def test_a_constant_estimator_gains_nothing_from_the_order_of_the_table() -> None:
    truth = -np.arange(4000.0)  # the table is sorted, best first
    assert criteria.precision(np.zeros(4000), truth, 0.1) == pytest.approx(0.1, abs=0.05)
    assert abs(criteria.rank_gap(np.zeros(4000), truth).mean()) < 1e-9


def test_bias_finds_what_is_put_in() -> None:
    rng = np.random.default_rng(1)
    size = rng.uniform(1, 10, 1000)
    truth = rng.normal(size=1000)
    groups = criteria.bias_by_complexity(truth + 0.3 * size, truth, size)
    assert [g["networks"] for g in groups] == [200] * 5
    gaps = [g["gap"] for g in groups]
    assert gaps == sorted(gaps)
    assert gaps[0] < -0.1 < 0.1 < gaps[-1]
    fair = criteria.bias_by_complexity(truth, truth, size)
    assert all(g["gap"] == 0 and g["kendall"] == pytest.approx(1) for g in fair)
    conv = rng.integers(0, 4, 1000).astype(float)
    skip = rng.integers(0, 4, 1000).astype(float)
    found = criteria.bias_by_operator(truth + 0.5 * conv, truth, {"conv": conv, "skip": skip})
    assert found["conv"]["slope"] > 0.05
    assert abs(found["skip"]["slope"]) < 0.02
    assert found["conv"]["slope"] == pytest.approx(
        np.polyfit(conv, criteria.rank_gap(truth + 0.5 * conv, truth), 1)[0]
    )


def test_operators_are_counted_by_name_where_they_are_active() -> None:
    space = Space([choice("a", "conv", "skip"), choice("b", "conv", "pool", when={"a": ("conv",)})])
    codes = space.encode([{"a": "conv", "b": "conv"}, {"a": "conv", "b": "pool"}, {"a": "skip"}])
    found = criteria.operator_counts(space, codes)
    assert {k: v.tolist() for k, v in found.items()} == {
        "conv": [2, 1, 0],
        "skip": [0, 0, 1],
        "pool": [0, 1, 0],
    }


def test_intervals_narrow_with_networks_and_hold_the_value() -> None:
    wide = interval(criteria.spearman, SCORES[:30], TRUTH[:30])
    narrow = interval(criteria.spearman, SCORES, TRUTH)
    assert wide[1] - wide[0] > narrow[1] - narrow[0]
    assert narrow[0] < criteria.spearman(SCORES, TRUTH) < narrow[1]
    assert interval(criteria.spearman, SCORES, TRUTH) == narrow


def test_the_whole_report_is_json_and_counts_what_has_no_score() -> None:
    scores = SCORES.copy()
    scores[:5] = np.nan
    found = criteria.criteria(scores, TRUTH, complexity=np.abs(SCORES), resamples=20)
    assert found["networks"] == 115
    assert found["without_score"] == 5
    assert found["kendall"]["low"] <= found["kendall"]["value"] <= found["kendall"]["high"]
    assert set(found["best_rank"]) == {"0.01", "0.05", "0.1", "0.5"}
    json.dumps(found, allow_nan=False)
