"""Limits and budgets are read or refused; ranks, fronts and volumes against brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.errors import BudgetError
from espalier.problem import (
    Limit,
    Metric,
    Metrics,
    Problem,
    Reading,
    SearchBudget,
    crowding,
    dominates,
    front,
    hypervolume,
    limits,
    quantity,
    ranks,
)

# --- limits -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "metric", "expected"),
    [
        (0.8, "latency_ms", ("", 0.8, False)),
        (5, "params", ("", 5.0, False)),
        ("60k", "params", ("", 60e3, False)),
        ("60K", "params", ("", 60e3, False)),
        ("<= 2M", "macs", ("<=", 2e6, False)),
        (">=1.5g", "macs", (">=", 1.5e9, False)),
        ("1.5MB", "bytes", ("", 1.5e6, False)),
        ("1.5MiB", "activation_bytes", ("", 1.5 * 2**20, False)),
        ("3k", "bytes", ("", 3e3, False)),
        ("12b", "bytes", ("", 12.0, False)),
        ("800us", "latency_ms", ("", 0.8, False)),
        ("2s", "latency_ms", ("", 2000.0, False)),
        ("1e3", "params", ("", 1000.0, False)),
        (".5", "x", ("", 0.5, False)),
        ("60%", "macs", ("", 0.6, True)),
    ],
)
def test_quantity_reads(text: str | float, metric: str, expected: tuple[str, float, bool]) -> None:
    op, value, relative = quantity(text, metric)
    assert (op, relative) == (expected[0], expected[2])
    assert value == pytest.approx(expected[1])


@pytest.mark.parametrize(
    ("text", "metric", "said"),
    [
        (0, "params", "above 0"),
        (-3.0, "params", "above 0"),
        (math.nan, "params", "finite"),
        (math.inf, "params", "finite"),
        ("1e999", "params", "finite"),
        ("0", "params", "above 0"),
        ("0%", "params", "above 0"),
        ("-5k", "params", "can't read"),
        ("", "params", "can't read"),
        ("fast", "latency_ms", "can't read"),
        ("<= <= 3", "params", "can't read"),
        ("3 k k", "params", "can't read"),
        (True, "params", "can't read"),
        (None, "params", "can't read"),
        ("3 msec", "latency_ms", "'ms'"),
        ("3 MB", "params", "unknown unit"),
        ("3 ms", "macs", "unknown unit"),
        ("5k", "latency_ms", "unknown unit"),
    ],
)
def test_quantity_refuses_with_the_value(text: object, metric: str, said: str) -> None:
    with pytest.raises(BudgetError) as caught:
        quantity(text, metric)  # type: ignore[arg-type]
    assert said in str(caught.value)
    assert metric in str(caught.value)
    assert "\n" not in str(caught.value)


def test_limits_read_several_with_their_direction() -> None:
    read = limits({"latency_ms": 0.8, "params": "60k", "macs": "< 2M", "speed": "> 3", "b": "=> 4"})
    assert [(x.metric, x.op, x.bound) for x in read] == [
        ("latency_ms", "<=", 0.8),
        ("params", "<=", 60e3),
        ("macs", "<=", 2e6),
        ("speed", ">=", 3.0),
        ("b", ">=", 4.0),
    ]
    assert limits(None) == ()
    assert limits(read) == read


def test_relative_limits_resolve() -> None:
    (half,) = limits({"macs": "<= 50%"})
    assert str(half) == "macs <= 50%"
    assert half.resolve(300.0) == Limit("macs", 150.0)
    assert Limit("macs", 7.0).resolve(300.0) == Limit("macs", 7.0)


def test_violation_is_the_share_beyond_the_bound() -> None:
    assert Limit("a", 2.0).violation([1.0, 2.0, 3.0, math.nan]).tolist() == [0, 0, 0.5, math.inf]
    assert Limit("a", 2.0, ">=").violation([1.0, 2.0, 3.0]).tolist() == [0.5, 0, 0]


# --- the budget of a search -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds", "trials"),
    [
        ("2min", 120, None),
        ("90s", 90, None),
        ("1h", 3600, None),
        ("1.5 hours", 5400, None),
        ("500 trials", None, 500),
        ("1 trial", None, 1),
        ("10min, 500 trials", 600, 500),
        ("500 trials + 2 M", 120, 500),
        (30, 30, None),
        (0.5, 0.5, None),
        (SearchBudget(4, 2), 4, 2),
    ],
)
def test_search_budget_reads(text: str | float, seconds: float, trials: int) -> None:
    read = SearchBudget.parse(text)
    assert (read.seconds, read.trials) == (seconds, trials)
    assert SearchBudget.parse(str(read)) == read


@pytest.mark.parametrize(
    "text",
    ["", "fast", "2", "-3s", "0s", "0 trials", "1.5 trials", "5 parsecs", "1min, 2min", "2min,",
     "3 trials, 4 trials", -1, 0, math.nan, math.inf, True],
)  # fmt: skip
def test_search_budget_refuses(text: str | float) -> None:
    with pytest.raises(BudgetError) as caught:
        SearchBudget.parse(text)
    assert "reads like" in str(caught.value)


# --- metrics ----------------------------------------------------------------------------------


def test_metrics_keep_rows_units_and_spread() -> None:
    ms, n = Metric("ms", "ms", how="measured"), Metric("n")
    left = Metrics({"ms": [1, 2], "n": [3, 4]}, [ms, n], {"ms": [0.1, 0.2]})
    assert left.readings()[1] == {
        "ms": Reading(2.0, "ms", "measured", "", 0.2),
        "n": Reading(4.0),
    }
    both = Metrics.concat([left, left])
    assert both["n"].tolist() == [3, 4, 3, 4]
    assert both.readings()[2]["ms"].spread == 0.1
    plain = Metrics({"ms": [5, 6]}, [ms])
    assert (left | plain).readings()[0]["ms"] == Reading(5.0, "ms", "measured")
    assert Metrics.concat([Metrics({"ms": [1.0]}, [ms], {"ms": [0.1]}), plain])["ms"].size == 3
    assert Reading.from_json(left.readings()[0]["ms"].to_json()) == left.readings()[0]["ms"]


def test_metrics_refuse_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="one length"):
        Metrics({"a": [1, 2], "b": [1]}, [Metric("a"), Metric("b")])
    with pytest.raises(ValueError, match="needs its Metric"):
        Metrics({"a": [1]}, [Metric("b")])
    with pytest.raises(KeyError, match="accuracy"):
        Metrics({"accuracy": [1]}, [Metric("accuracy")])["acuracy"]


def test_problem_minimises_and_adds_violations() -> None:
    problem = Problem(
        (Metric("acc", goal="max"), Metric("cost")),
        (Limit("cost", 2.0), Limit("acc", 0.5, ">="), Limit("absent", 1.0)),
    )
    rows = Metrics({"acc": [0.75, 0.25], "cost": [3, 1]}, [Metric("acc"), Metric("cost")])
    assert problem.values(rows).tolist() == [[-0.75, 3], [-0.25, 1]]
    assert problem.violations(rows).tolist() == [0.5, 0.5]


# --- order ------------------------------------------------------------------------------------


def brute_ranks(values: np.ndarray, violations: np.ndarray) -> list[int]:
    """Peels fronts by the definition of constraint domination, one pair at a time."""

    def before(i: int, j: int) -> bool:
        a, b = violations[i], violations[j]
        if a > 0 or b > 0:
            return bool(a < b)
        return dominates(values[i], values[j])

    left, out, rank = set(range(len(values))), [-1] * len(values), 0
    while left:
        level = [i for i in left if not any(before(j, i) for j in left if j != i)]
        for i in level:
            out[i] = rank
        left -= set(level)
        rank += 1
    return out


grids = st.integers(1, 3).flatmap(
    lambda m: st.lists(st.tuples(*[st.integers(0, 4)] * m), min_size=1, max_size=18)
)


@settings(max_examples=150, deadline=None)
@given(grids, st.data())
def test_ranks_and_front_match_brute_force(
    rows: list[tuple[int, ...]], data: st.DataObject
) -> None:
    values = np.array(rows, dtype=float)
    violations = np.array(
        data.draw(st.lists(st.sampled_from([0.0, 0.0, 0.5, 2.0, math.inf]), min_size=len(rows),
                           max_size=len(rows)))
    )  # fmt: skip
    expected = brute_ranks(values, violations)
    assert ranks(values, violations).tolist() == expected
    best = front(values, violations)
    assert sorted(best) == [i for i, r in enumerate(expected) if r == 0]
    assert values[best, 0].tolist() == sorted(values[best, 0])


def test_failed_rows_come_last_and_never_on_the_front() -> None:
    values = np.array([[1.0, 1.0], [np.nan, np.nan], [2.0, 2.0], [np.nan, np.nan], [0.0, np.nan]])
    violations = np.array([0.0, 0.0, 3.0, 1.0, np.nan])
    # kept, failed, refused by 3, refused by 1, unknown violation
    assert ranks(values, violations).tolist() == [0, 3, 2, 1, 3]
    assert front(values, violations).tolist() == [0]
    assert front(values[[1, 3]], violations[[1, 3]]).tolist() == []
    assert front(values[[2]], violations[[2]]).tolist() == [0]
    assert front(np.zeros((0, 2))).tolist() == []
    assert ranks(np.zeros((0, 2))).tolist() == []


def test_crowding_prefers_the_lonely() -> None:
    values = np.array([[0.0, 4.0], [1.0, 3.0], [1.5, 2.5], [4.0, 0.0]])
    got = crowding(values)
    assert np.isinf(got[[0, 3]]).all()
    assert got[1] == pytest.approx(1.5 / 4 + 1.5 / 4)
    assert got[2] == pytest.approx(3 / 4 + 3 / 4)
    assert crowding(np.ones((3, 2))).max() == np.inf
    assert crowding(np.zeros((0, 2))).shape == (0,)


@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_hypervolume_against_monte_carlo(m: int) -> None:
    rng = np.random.default_rng(m)
    values = rng.random((12, m)) * 1.2  # some beyond the reference
    values[-1] = values[0]  # and one twice
    points = rng.random((200_000, m))
    covered = np.zeros(len(points), dtype=bool)
    for row in values:
        covered |= (points >= row).all(1)
    got = hypervolume(values, np.ones(m))
    # four standard errors of the estimate
    assert got == pytest.approx(covered.mean(), abs=4 * math.sqrt(0.25 / len(points)))


def test_hypervolume_of_simple_fronts() -> None:
    assert hypervolume([[0.0, 0.0]], [2, 3]) == 6
    assert hypervolume([[0, 1], [1, 0]], [2, 2]) == 3
    assert hypervolume([[0, 0, 0], [1, 1, 1]], [1, 1, 2]) == 2
    assert hypervolume([[3, 3]], [2, 2]) == 0
    assert hypervolume([], [2, 2]) == 0
    assert hypervolume([[np.nan, 0], [1, 1]], [2, 2]) == 1
