"""Multi-fidelity strategies: rungs and promotions against tables made by hand, and the suite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from espalier import nets, tasks
from espalier.costs import Counts
from espalier.errors import EspalierError, SpaceError
from espalier.estimators import Trained
from espalier.flows.evaluate import Score
from espalier.problem import Problem
from espalier.solvers.strategies import ASHA, BOHB, Hyperband, SuccessiveHalving
from espalier.solvers.strategies.density import Density
from espalier.solvers.strategies.fidelity import MultiFidelity
from espalier.solvers.strategies.levels import Levels, extended
from espalier.solvers.strategies.population import Population
from espalier.solvers.strategies.results import Results
from espalier.space import Candidate, Linear, Space, choice, integer, ordinal, real
from espalier.study import Serial, Study
from espalier.testing import check_fidelity
from espalier.testing import fidelity as suite
from espalier.train import Recipe

INNER = Space([integer("x", 0, 99), integer("y", 0, 99)])
KINDS = [SuccessiveHalving, Hyperband, ASHA, BOHB]


def by_x(codes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A loss whose order is the same at every level: x, then y."""
    return (codes[:, 0] * 100.0 + codes[:, 1])[:, None].astype(float)


def run(strategy: MultiFidelity, rows: int) -> list[tuple[float, int]]:
    """(loss, level) of each row, told one after the other."""
    out = []
    for _ in range(rows):
        codes = strategy.ask(1)
        loss = by_x(codes)
        out.append((float(loss[0, 0]), int(strategy.levels.of(codes)[0])))
        strategy.tell(codes, loss, np.zeros(1))
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_every_strategy_passes_the_suite(kind: type[MultiFidelity]) -> None:
    check_fidelity(kind)


def test_a_bracket_of_halving_is_27_9_3_1_of_the_best() -> None:
    strategy = SuccessiveHalving(extended(INNER, (1, 3, 9, 27)), 0)
    asked = run(strategy, 40 + 27)
    assert [level for _, level in asked] == [0] * 27 + [1] * 9 + [2] * 3 + [3] + [0] * 27
    losses = sorted(loss for loss, _ in asked[:27])
    assert [loss for loss, _ in asked[27:36]] == losses[:9]
    assert [loss for loss, _ in asked[36:39]] == losses[:3]
    assert asked[39][0] == losses[0]
    eta2 = SuccessiveHalving(extended(INNER, (1, 2, 4)), 0, eta=2, candidates=6)
    assert [level for _, level in run(eta2, 10)] == [0] * 6 + [1] * 3 + [2]


def test_hyperband_of_81_epochs_is_as_its_formula_says() -> None:
    """Li et al. (2018), algorithm 1 with R = 81 and eta = 3, by hand: candidates of each rung."""
    table = [[81, 27, 9, 3, 1], [34, 11, 3, 1], [15, 5, 1], [8, 2], [5]]
    strategy = Hyperband(extended(INNER, (1, 3, 9, 27, 81)), 0)
    levels = [level for _, level in run(strategy, sum(map(sum, table)))]
    expected = [
        first + rung
        for first, rungs in enumerate(table)
        for rung, count in enumerate(rungs)
        for _ in range(count)
    ]
    assert levels == expected
    assert run(strategy, 1)[0][1] == 0  # and from the beginning


def test_asha_promotes_as_soon_as_one_in_three_may() -> None:
    """Losses 5 3 4 | 2 1 6 | 0: by hand, the rule of Li et al. (2020), algorithm 2."""
    space = extended(Space([integer("x", 0, 9)]), (1, 3, 9))
    strategy = ASHA(space, 0)
    known = {}
    order = []
    losses = iter([5.0, 3.0, 4.0, 2.0, 1.0, 6.0, 0.0])
    for _ in range(11):
        codes = strategy.ask(1)
        level = int(strategy.levels.of(codes)[0])
        if level == 0:
            known[int(codes[0, 0])] = next(losses)
        loss = known[int(codes[0, 0])]
        order.append((loss, level))
        strategy.tell(codes, np.array([[loss]]), np.zeros(1))
    assert order == [
        *[(5.0, 0), (3.0, 0), (4.0, 0), (3.0, 1)],  # 1 of 3 may go on
        # of 4 and of 5 still one may, and that is now another: the promotion before is not undone
        *[(2.0, 0), (2.0, 1), (1.0, 0), (1.0, 1), (1.0, 2)],  # 1 of 3 at the second level too
        *[(6.0, 0), (0.0, 0)],  # of 6 two may: both are there already
    ]


def test_many_running_never_stall_a_bracket() -> None:
    """While a rung waits the next bracket begins, and the promotion comes when the last is told."""
    strategy = SuccessiveHalving(extended(INNER, (1, 3, 9)), 0)
    waiting = strategy.ask(20)
    assert (strategy.levels.of(waiting) == 0).all()
    strategy.tell(waiting[:8], by_x(waiting[:8]), np.zeros(8))
    assert strategy.levels.of(strategy.ask(1)).tolist() == [0]
    strategy.tell(waiting[8:9], by_x(waiting[8:9]), np.zeros(1))
    promoted = strategy.ask(3)
    assert strategy.levels.of(promoted).tolist() == [1, 1, 1]
    assert by_x(promoted)[:, 0].tolist() == sorted(by_x(waiting[:9])[:, 0])[:3]


def test_the_refused_take_nobodys_place() -> None:
    strategy = SuccessiveHalving(extended(INNER, (1, 3)), 0)
    for turn in range(5):
        codes = strategy.ask(1)
        assert strategy.levels.of(codes).tolist() == [0]
        refused = turn in (1, 2)
        value = np.array([[np.nan]]) if refused else by_x(codes)
        strategy.tell(codes, value, np.array([0.3 if refused else 0.0]))
    assert strategy.levels.of(strategy.ask(1)).tolist() == [1]


@pytest.mark.parametrize("objectives", [1, 2])
def test_the_order_of_a_level_is_that_of_a_population(objectives: int) -> None:
    rng = np.random.default_rng(0)
    results = Results(INNER, 1)
    codes = INNER.sample(60, rng)
    values = rng.integers(0, 12, (60, objectives)).astype(float)  # many are equal
    values[rng.random(60) < 0.2] = np.nan
    violations = np.where(rng.random(60) < 0.2, 0.5, 0.0)
    for i, number in enumerate(results.number(codes)):
        results.tell(0, number, values[i], float(violations[i]))
        if i % 17 == 0:
            results.best(0)
    people = Population.told(codes, values, violations)
    expected = [int(i) for i in people.best_first if people.kept[i]]
    assert [results.number(codes)[i] for i in expected] == results.best(0)
    copy = Results.from_json(INNER, results.to_json())
    assert copy.best(0) == results.best(0)
    refused = (np.isnan(values).any(axis=1) & (violations > 0)).sum()
    assert results.evaluated == copy.evaluated == [60 - refused]


def test_several_objectives_are_promoted_by_front_and_then_by_crowding() -> None:
    strategy = SuccessiveHalving(extended(INNER, (1, 3, 9)), 0)
    codes = strategy.ask(9)
    front = [[0, 9], [1, 8], [4, 4], [9, 0]]  # the second is the most crowded
    values = np.array([*front, [5, 9], [9, 9], [6, 6], [8, 7], [7, 8]], dtype=float)
    strategy.tell(codes, values, np.zeros(9))
    on = strategy.levels.strip(strategy.ask(3))
    assert {tuple(r) for r in on} == {tuple(r) for r in strategy.levels.strip(codes)[[0, 2, 3]]}


def test_levels_go_down_from_the_largest() -> None:
    assert Levels(Space([INNER["x"], integer("epochs", 1, 50)])).amounts == (1, 2, 6, 17, 50)
    assert Levels(extended(INNER, (1, 2, 3, 5, 9))).amounts == (1, 3, 9)
    assert Levels(extended(INNER, (2, 50, 200))).amounts == (2, 50, 200)
    assert Levels(extended(INNER, (0.1, 0.3, 1.0))).amounts == (0.1, 0.3, 1.0)
    assert Levels(extended(INNER, (1, 2, 4, 8)), eta=2).amounts == (1, 2, 4, 8)
    assert Levels(INNER).amounts == (1.0,)


def test_rows_and_candidates_go_back_and_forth_wherever_the_decision_stands() -> None:
    space = Space([integer("x", 0, 9), ordinal("epochs", 1, 3, 5, 9), real("lr", 0, 1)])
    levels = Levels(space)
    inner = levels.inner.sample(20, np.random.default_rng(0))
    for level, epochs in enumerate((1, 3, 9)):
        rows = levels.at(inner, level)
        assert [c["epochs"] for c in space.decode(rows)] == [epochs] * 20
        assert np.array_equal(levels.strip(rows), inner)
        assert (levels.of(rows) == level).all()
    unused = space.encode([{"x": 1, "epochs": 5, "lr": 0.5}])
    assert levels.of(unused).tolist() == [-1]


def test_bad_fidelities_are_refused() -> None:
    bad = [
        ([choice("epochs", 1, 3)], "ordinal or integer"),
        ([ordinal("epochs", "few", "many")], "of numbers"),
        ([ordinal("epochs", 3, 1)], "rise"),
        ([integer("epochs", 0, 9)], "above 0"),
        ([ordinal("epochs", 1, 3), real("lr", 0, 1, when={"epochs": (3,)})], "'lr' does"),
    ]
    for decisions, message in bad:
        with pytest.raises(EspalierError, match=message):
            ASHA(Space([integer("x", 0, 9), *decisions]))
    with pytest.raises(EspalierError, match="hang on"):
        ASHA(Space([integer("x", 0, 9), integer("epochs", 1, 9)], [_rule()]))
    with pytest.raises(EspalierError, match="no decision beside"):
        ASHA(Space([integer("epochs", 1, 9)]))
    with pytest.raises(SpaceError, match="already"):
        extended(extended(INNER, (1, 3)), (1, 3))
    with pytest.raises(EspalierError, match="eta"):
        ASHA(INNER, eta=1)
    with pytest.raises(EspalierError, match="good=2"):
        BOHB(INNER, good=2)
    with pytest.raises(EspalierError, match=r"'asha'.*'bohb'"):
        BOHB(INNER).load(ASHA(INNER).state())


def _rule() -> Linear:
    return Linear({"x": 1, "epochs": 1}, "<=", 12)


def test_rows_known_from_elsewhere_are_used_and_not_asked() -> None:
    space = extended(INNER, (1, 3, 9))
    known = Levels(space).at(INNER.sample(12, np.random.default_rng(5)), 0)
    asha = ASHA(space, 0)
    asha.tell(known, by_x(known), np.zeros(12))
    first = asha.ask(4)
    assert asha.levels.of(first).tolist() == [1] * 4
    best = sorted(by_x(known)[:, 0])[:4]
    assert by_x(first)[:, 0].tolist() == best


def test_density_is_a_density_and_draws_from_itself() -> None:
    space = Space([choice("k", *"abc"), ordinal("n", 1, 2, 3, 4)])
    every = space.enumerate()
    points = every[[0, 1, 1, 5, 5, 5]]
    density = Density(space, points)
    assert np.exp(density.log(every)).sum() == pytest.approx(1.0, abs=1e-6)
    assert density.log(every).argmax() == 5
    drawn = density.draw(4000, np.random.default_rng(0))
    assert space.valid(drawn).all()
    share = np.mean(drawn[:, 0] == every[5, 0])
    # half of the points are of that kind; a share of each kernel goes to the other two
    width = 1.06 * 6 ** (-1 / 6) * np.sqrt(1 - 0.5**2 - 0.5**2)
    assert share == pytest.approx(0.5 * (1 - width) + 0.5 * width / 2, abs=0.03)


def test_density_of_numbers_looks_at_their_scale() -> None:
    space = Space([real("lr", 1e-4, 1.0, log=True), integer("n", 0, 999)])
    points = space.encode([{"lr": 1e-2 * f, "n": 500 + i} for i, f in enumerate((0.8, 1, 1.2))])
    density = Density(space, points)
    near, far = space.encode([{"lr": 1.1e-2, "n": 505}, {"lr": 0.9, "n": 5}])
    assert density.log(near[None])[0] > density.log(far[None])[0] + 3
    drawn = density.draw(500, np.random.default_rng(0))
    assert space.valid(drawn).all()
    assert abs(np.median(np.log10(drawn[:, 0])) + 2) < 0.2


# --- with real trainings -------------------------------------------------------------------------


def test_hyperband_searches_with_real_trainings(tmp_path: Path) -> None:
    """Each trial is trained for its own epochs, the same network from the same weights."""
    task = tasks.make("digits:train=120,validation=100,test=50")
    torch.manual_seed(0)
    family = nets.MobileNet(
        task.shape,
        task.classes,
        stem=(4, 8),
        widths=[(8,), (8, 16), (12, 24)],
        depth=(1, 2),
        expansion=(1, 2),
        head=(16, 32),
    )
    space = extended(family.space, (1, 3))
    levels = Levels(space)
    estimator = Trained(family, task, Recipe(epochs=20, batch=32))
    problem = Problem((estimator.metrics[0],))
    counts = Counts(family)
    with Study.create(tmp_path / "study", {}, {}, 0) as study:
        trials = study.search(
            "search",
            problem,
            Hyperband(space, 0),
            Score(estimator),
            trials=7,
            batch=2,
            executor=Serial(),
            price=lambda codes: counts.estimate_codes(levels.strip(codes)),
        )
    assert [t.state for t in trials] == ["done"] * 7
    assert [t.candidate["epochs"] for t in trials] == [1, 1, 1, 3, 3, 3, 1]
    quality = estimator.metrics[0].name
    first = sorted(trials[:3], key=lambda t: -t.metrics[quality].value)
    inner = [{k: v for k, v in t.candidate.items() if k != "epochs"} for t in trials]
    assert inner[trials.index(first[0])] in inner[3:6]
    # the trial of 3 epochs is the plain training of that network for 3 epochs
    last = next(i for i in (3, 4, 5) if inner[i] == inner[trials.index(first[0])])
    plain = Trained(family, task, Recipe(epochs=3, batch=32))
    expected = plain.estimate([family.space.candidate(inner[last])])[quality][0]
    assert trials[last].metrics[quality].value == expected
    with pytest.raises(EspalierError, match="number of epochs"):
        estimator.estimate([Candidate({**inner[0], "epochs": 1.5})])


# --- the suite fails those that break its rules --------------------------------------------------


class Impatient(ASHA):
    """Promotes without waiting for results."""

    def _next(self) -> tuple[int, int] | None:
        for level in range(self.levels.top):
            for number in self.results.asked[level] - self.results.asked[level + 1]:
                return number, level + 1
        return super()._next()


class Generous(SuccessiveHalving):
    """Promotes two in three."""

    def __init__(self, space: Space, seed: int = 0) -> None:
        super().__init__(space, seed)
        self.eta = 1


class Forgiving(ASHA):
    """Takes a failure or a broken limit for a good result."""

    def tell(self, codes: Any, values: Any, violations: Any) -> None:
        super().tell(codes, np.nan_to_num(values, nan=-5.0), np.zeros(len(codes)))


class Worst(SuccessiveHalving):
    """Promotes the worst."""

    def tell(self, codes: Any, values: Any, violations: Any) -> None:
        super().tell(codes, -np.asarray(values), violations)


class ForgetsRunning(ASHA):
    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        for asked, told in zip(self.results.asked, self.results.told, strict=True):
            asked.intersection_update(told)


class Stops(Hyperband):
    def _left_over(self) -> tuple[int, int] | None:
        return None


@pytest.mark.parametrize("kind", [Impatient, Generous, Forgiving, Worst, ForgetsRunning, Stops])
def test_the_suite_catches(kind: type[MultiFidelity]) -> None:
    with pytest.raises(AssertionError):
        suite.check_fidelity(kind)
