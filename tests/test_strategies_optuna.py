"""Optuna's samplers as strategies: that they learn, honour conditions and limits, and resume."""

from __future__ import annotations

import json
import logging
import sys
import warnings

import numpy as np
import optuna
import pytest

from espalier.errors import EspalierError, MissingExtra
from espalier.solvers import strategies
from espalier.solvers.strategies import CMAES, GP, TPE, Random
from espalier.space import Space, choice, integer, ordinal, real
from espalier.testing import strategy as suite
from test_strategies_suite import MIXED

NUMBERS = Space([integer(f"x{i}", 0, 7) for i in range(6)])
KINDS = Space([choice(f"k{i}", *"abcd") for i in range(6)])
Strategy = strategies.Strategy


def best(strategy: Strategy, rows: int, n: int = 1) -> float:
    score = suite.distances(strategy.space, 1)
    return float(suite.drive(strategy, score, rows // n, n)[1].min())


@pytest.mark.parametrize(
    ("kind", "space", "rows", "n"),
    [
        (TPE, NUMBERS, 80, 1),
        (TPE, KINDS, 60, 4),
        (GP, NUMBERS, 22, 2),
        (CMAES, NUMBERS, 100, 1),
        (CMAES, KINDS, 120, 4),
    ],
)
def test_nearer_to_the_best_than_random_search(
    kind: type[Strategy], space: Space, rows: int, n: int
) -> None:
    seeds = range(1 if kind is GP else 2)  # a Gaussian process takes its time
    mine = np.mean([best(kind(space, s), rows, n) for s in seeds])
    chance = np.mean([best(Random(space, s), rows, n) for s in range(10)])
    assert mine < 0.8 * chance


@pytest.mark.parametrize("kind", [TPE, CMAES])
def test_violations_of_refused_rows_lead_to_the_rows_that_keep_the_limit(
    kind: type[Strategy],
) -> None:
    middle = np.full((1, 6), 4, dtype=NUMBERS.dtype)

    def kept(strategy: Strategy) -> int:
        count = 0
        for _ in range(15):
            codes = strategy.ask(6)
            far = NUMBERS.distance(codes, middle)[:, 0]
            broken = np.maximum(far - 0.15, 0.0)
            values = np.where(broken > 0, np.nan, far)[:, None]
            count += int((broken <= 0).sum())
            strategy.tell(codes, values, broken)
        return count

    mine = sum(kept(kind(NUMBERS, s)) for s in range(3))
    chance = sum(kept(Random(NUMBERS, s)) for s in range(3))
    assert mine > 3 * chance


def test_a_limit_reaches_the_gaussian_process_when_it_is_first_broken() -> None:
    strategy = GP(NUMBERS, 0, startup=6)
    middle = np.full((1, 6), 4, dtype=NUMBERS.dtype)
    for turn in range(6):
        codes = strategy.ask(2)
        far = NUMBERS.distance(codes, middle)
        broken = np.array([0.0, 0.5 if turn > 3 else 0.0])
        strategy.tell(codes, far, broken)
    told = strategy._study.get_trials()
    limits = [t.constraints["limits"] for t in told if t.constraints]
    assert limits == [0.0] * 8 + [0.0, 0.5 / 1.5] * 2


def test_two_objectives_spread_over_the_front() -> None:
    """The hypervolume of TPE is above random search's; CMA-ES goes to one point and says so."""
    score = suite.distances(NUMBERS, 2)

    def volume(strategy: Strategy) -> float:
        values = suite.drive(strategy, score, 15, 6)[1]
        return suite.hypervolume(values, [0.6, 0.6])

    mine = np.mean([volume(TPE(NUMBERS, s)) for s in range(3)])
    assert mine > np.mean([volume(Random(NUMBERS, s)) for s in range(10)])
    single = CMAES(NUMBERS, 0)
    assert len(suite.drive(single, score, 10, 6)[0]) == 60


@pytest.mark.parametrize("objectives", [1, 2])
def test_a_gaussian_process_resumes_exactly_also_between_ask_and_tell(objectives: int) -> None:
    score = suite.distances(NUMBERS, objectives)
    first, second = GP(NUMBERS, 3, startup=5), GP(NUMBERS, 8, startup=5)
    suite.drive(first, score, 2, 3)
    waiting = first.ask(1)
    second.load(json.loads(json.dumps(first.state(), allow_nan=False)))
    for strategy in (first, second):
        strategy.tell(waiting, *score(waiting))
    assert np.array_equal(first.ask(1), second.ask(1))


@pytest.mark.parametrize("kind", [TPE, GP])
def test_inactive_decisions_are_not_suggested(kind: type[Strategy]) -> None:
    strategy = kind(MIXED, 0, startup=5)
    score = suite.distances(MIXED, 1)
    asks = 3 if kind is GP else 5  # each ask of it is a fit
    codes = suite.drive(strategy, score, asks, 3)[0]
    assert MIXED.valid(codes).all()
    seen = 0
    for trial in strategy._study.get_trials():
        if trial.state.name == "COMPLETE":
            options = trial.params
            assert ("c" in options) == (options["a"] < 2)
            assert ("lr" in options) == (options["a"] == 0)
            seen += 1
    assert seen == 3 * asks


def test_codes_are_suggested_as_what_decisions_are() -> None:
    space = Space([choice("a", "p", "q"), ordinal("b", 1, 5), real("c", 1e-3, 1, log=True)])
    strategy = TPE(space, 0)
    suite.drive(strategy, suite.distances(space, 1), 2, 3)
    kinds = strategy._study.get_trials()[0].distributions
    assert isinstance(kinds["a"], optuna.distributions.CategoricalDistribution)
    assert isinstance(kinds["b"], optuna.distributions.IntDistribution)
    assert kinds["c"] == optuna.distributions.FloatDistribution(1e-3, 1, log=True)


def test_failed_rows_are_left_out_and_order_is_kept_by_cma_es() -> None:
    strategy = CMAES(NUMBERS, 0)
    codes = strategy.ask(8)
    strategy.tell(codes, np.arange(8.0)[:, None], np.zeros(8))
    values = [
        strategy._scalar(np.array([v]), b)
        for v, b in ((-3.0, 0), (2.0, 0), (-9.0, 0.1), (np.nan, 0.5), (np.nan, np.inf), (np.nan, 0))
    ]
    assert values == sorted(values)
    assert len(set(values)) == 6
    tpe = TPE(NUMBERS, 0)
    codes = tpe.ask(4)
    tpe.tell(codes, np.array([[1.0], [np.nan], [2.0], [np.nan]]), np.array([0, 0, 0, 0.5]))
    assert len(tpe._study.get_trials()) == 3


def test_optuna_is_silent_and_its_settings_are_left(capfd: pytest.CaptureFixture[str]) -> None:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for kind in (TPE, GP, CMAES):
                suite.drive(kind(KINDS, 0), suite.distances(KINDS, 1), 2, 3)
        assert optuna.logging.get_verbosity() == logging.INFO
    finally:
        optuna.logging.set_verbosity(before)
    out, err = capfd.readouterr()
    assert out + err == ""


def test_one_decision_is_enough_for_a_covariance() -> None:
    for space in (Space([integer("x", 0, 40)]), Space([choice("x", "a", "b")])):
        codes = suite.drive(CMAES(space, 0), suite.distances(space, 1), 8, 3)[0]
        assert len(codes) == min(24, space.size)


def test_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EspalierError, match="at least 2 random rows, got 0"):
        TPE(NUMBERS, 0, startup=0)
    with pytest.raises(EspalierError, match="most=0"):
        GP(NUMBERS, 0, most=0)
    with pytest.raises(EspalierError, match="at least 4 rows, got 1"):
        CMAES(NUMBERS, 0, population=1)
    with pytest.raises(EspalierError, match=r"'tpe'.*'gp'"):
        GP(NUMBERS, 0).load(TPE(NUMBERS, 0).state())
    for module, kind in (("optuna", TPE), ("cmaes", CMAES)):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, module, None)
            with pytest.raises(MissingExtra, match=rf"{module}.*espalier\[bayes\]"):
                kind(NUMBERS, 0).ask(1)


def test_a_distribution_that_converged_goes_on_near_the_best_rows_at_little_cost() -> None:
    space = Space([integer(f"x{i}", 0, 9) for i in range(4)])
    strategy, chance = CMAES(space, 0), Random(space, 0)
    score = suite.distances(space, 1)
    values = suite.drive(strategy, score, 250, 1)[1]
    assert strategy._converged
    assert len(strategy._study.get_trials()) < 2 * 250
    assert values[200:].mean() < 0.6 * suite.drive(chance, score, 250, 1)[1].mean()
