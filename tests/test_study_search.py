"""The loop of a search: what is asked, refused, evaluated, told and recorded."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import study_toys as toys
from espalier.errors import StudyError
from espalier.problem import Limit, Metric, Metrics, Problem, Reading
from espalier.solvers import strategies
from espalier.solvers.strategies import NSGA2, Random, Strategy
from espalier.space import Candidate, Space, integer
from espalier.study import Serial, Study, Trial, runner
from espalier.testing.ledger import check_ledger


@pytest.fixture
def study(tmp_path: Path) -> Any:
    with Study.create(tmp_path / "run", toys.IDENTITY, {"workers": 0}, seed=5) as made:
        yield made


def test_ledger_passes_its_suite(tmp_path: Path) -> None:
    check_ledger(tmp_path)


class Watched(NSGA2):
    """Remembers what it was told."""

    def __init__(self, space: Space, seed: int = 0) -> None:
        super().__init__(space, seed)
        self.told: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def tell(self, codes: np.ndarray, values: np.ndarray, violations: np.ndarray) -> None:
        self.told.append((codes.copy(), values.copy(), violations.copy()))
        super().tell(codes, values, violations)


def test_prices_refuse_before_anything_is_evaluated(study: Study) -> None:
    called: list[Candidate] = []

    def evaluate(candidate: Candidate) -> dict[str, Reading]:
        called.append(candidate)
        return toys.evaluate(candidate)

    strategy = Watched(toys.SPACE, 3)
    trials = toys.search(study, evaluate, strategy)
    assert len(trials) == 40
    assert [t.candidate for t in trials] == called
    assert [t.position for t in trials] == list(range(40))
    for trial in trials:
        assert trial.state == "done"
        assert trial.violation == 0
        assert trial.attempts == 1
        assert trial.metrics["cost"].value == sum(int(v) for v in trial.candidate.values()) <= 16
        assert trial.metrics["cost"].unit == "u"
        assert trial.metrics["error"] == toys.evaluate(trial.candidate)["error"]
    by_candidate = {t.candidate: t for t in trials}
    refused = 0
    for codes, values, violations in strategy.told:
        for row, value, violation in zip(codes, values, violations, strict=True):
            (candidate,) = toys.SPACE.decode(row[None])
            if row.sum() > 16:
                refused += 1
                assert candidate not in by_candidate
                assert violation == pytest.approx((row.sum() - 16) / 16)
                assert np.isnan(value).all()
            else:
                assert violation == 0
                assert value.tolist() == [toys.error_of(candidate), row.sum()]
    assert refused > 0
    summary = study.refused("search")
    assert summary["refused"] >= refused
    assert summary["by"] == {"cost <= 16": summary["refused"]}
    assert summary["asked"] - summary["refused"] >= 40


def test_objectives_to_be_raised_are_told_negated(study: Study) -> None:
    problem = Problem((Metric("error", goal="max"),))
    strategy = Watched(toys.SPACE, 3)
    trials = toys.search(study, strategy=strategy, problem=problem, trials=8, price=None)
    told = strategy.told[0][1][:, 0]
    assert told.tolist() == [-t.metrics["error"].value for t in trials]


def test_limits_on_what_evaluate_gives_count(study: Study) -> None:
    problem = Problem((Metric("error"),), (Limit("error", 20.0), Limit("cost", 16.0)))
    strategy = Watched(toys.SPACE, 3)
    trials = toys.search(study, strategy=strategy, problem=problem)
    broken = [t for t in trials if t.metrics["error"].value > 20]
    assert broken
    for trial in broken:
        assert trial.state == "done"
        assert trial.violation == pytest.approx(trial.metrics["error"].value / 20 - 1)
    told = np.concatenate([v[~np.isnan(x[:, 0])] for _, x, v in strategy.told])
    assert sorted(told) == sorted(t.violation for t in trials[: len(told)])


def test_the_last_batch_is_cut_to_the_number_of_trials(study: Study) -> None:
    trials = toys.search(study, trials=13, batch=8)
    assert len(trials) == 13


def test_more_trials_on_resume_are_those_of_one_longer_search(tmp_path: Path) -> None:
    with Study.create(tmp_path / "a", toys.IDENTITY) as one:
        whole = toys.result(toys.search(one, trials=50))
    with Study.create(tmp_path / "b", toys.IDENTITY) as two:
        first = toys.result(toys.search(two, trials=21))
    with Study.resume(tmp_path / "b", toys.IDENTITY) as two:
        again = toys.result(toys.search(two, trials=21))
        assert again == first == whole[:21]
        assert toys.result(toys.search(two, trials=50)) == whole


def test_an_exhausted_space_ends_the_search(study: Study) -> None:
    space = Space([integer("a", 0, 4)])
    strategy = strategies.make("random", space, 0)
    problem = Problem((Metric("error"),))

    def evaluate(candidate: Candidate) -> dict[str, Reading]:
        return {"error": Reading(float(candidate["a"]))}

    trials = study.search(
        "search", problem, strategy, evaluate, trials=99, batch=4, executor=Serial()
    )
    assert sorted(int(t.candidate["a"]) for t in trials) == [0, 1, 2, 3, 4]


def test_nothing_feasible_ends_with_no_trials(study: Study) -> None:
    problem = Problem((Metric("error"),), (Limit("cost", -1.0),))
    assert toys.search(study, problem=problem) == []
    summary = study.refused("search")
    assert summary["asked"] == summary["refused"] > 0


class Stubborn(Random):
    """Asks one candidate for ever."""

    def ask(self, n: int) -> np.ndarray:
        return np.ones((n, len(self.space)), dtype=self.space.dtype)


def test_a_repeated_candidate_is_evaluated_once(study: Study) -> None:
    trials = toys.search(study, strategy=Stubborn(toys.SPACE, 0))
    assert len(trials) == 1


class Clock:
    """A clock that only moves when told."""

    now = 0.0

    def time(self) -> float:
        return self.now


def test_the_deadline_ends_it_and_the_decision_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(runner, "time", clock)

    def slow(candidate: Candidate) -> dict[str, Reading]:
        clock.now += 1
        return toys.evaluate(candidate)

    with Study.create(tmp_path / "run", toys.IDENTITY) as study:
        trials = toys.search(study, slow, trials=10_000, deadline=20.5)
        assert len(trials) == 21, "what had started was finished, nothing else began"
        assert {t.state for t in trials} == {"done"}
        assert study.meta["stop/search"]["reason"] == "deadline"
    with Study.resume(tmp_path / "run", toys.IDENTITY) as study:
        again = toys.search(study, toys.broken, trials=10_000, deadline=99.0)
        assert again == trials


def test_a_deadline_that_passed_gives_nothing_and_is_kept(study: Study) -> None:
    assert toys.search(study, deadline=time.time() - 1) == []
    assert toys.search(study, deadline=time.time() + 60) == []


def test_trials_that_were_all_done_are_not_stopped_by_a_late_deadline(study: Study) -> None:
    trials = toys.search(study, trials=5)
    assert toys.search(study, trials=5, deadline=time.time() - 1) == trials
    assert "stop/search" not in study.meta


# --- failures ---------------------------------------------------------------------------------


def test_failed_trials_are_kept_with_their_traceback_and_told(study: Study) -> None:
    def evaluate(candidate: Candidate) -> dict[str, Reading]:
        if candidate["a"] == 3:
            raise RuntimeError("diverged here")
        return toys.evaluate(candidate)

    strategy = Watched(toys.SPACE, 3)
    trials = toys.search(study, evaluate, strategy)
    failed = [t for t in trials if t.state == "failed"]
    assert failed
    assert all(t.candidate["a"] == 3 for t in failed)
    assert all(t.candidate["a"] != 3 for t in trials if t.state == "done")
    assert all(
        "RuntimeError: diverged here" in t.error and "in evaluate" in t.error for t in failed
    )
    assert {t.attempts for t in failed} == {2}
    codes, values, violations = (np.concatenate(x) for x in zip(*strategy.told, strict=True))
    rows = (codes[:, 0] == 3) & (codes.sum(1) <= 16)
    assert np.isnan(values[rows]).all()
    assert (violations[rows] == 0).all()
    assert len(trials) == 40


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"error": Reading(math.nan)}, "error is NaN"),
        ({"eror": Reading(1.0)}, "evaluate gave no 'error'"),
        ({"error": 1.0}, "must give a dict of metric name to Reading"),
        (None, "must give a dict of metric name to Reading"),
    ],
)
def test_unusable_readings_fail_the_trial(study: Study, given: Any, said: str) -> None:
    def evaluate(candidate: Candidate) -> Any:
        return toys.evaluate(candidate) if candidate["a"] != 0 else given

    trials = toys.search(study, evaluate)
    failed = [t for t in trials if t.state == "failed"]
    assert failed
    assert all(t.candidate["a"] == 0 and said in t.error for t in failed)


def test_numpy_numbers_are_readings(study: Study) -> None:
    def evaluate(candidate: Candidate) -> dict[str, Reading]:
        return {"error": Reading(np.float32(1.5), spread=np.float64(0.25))}  # type: ignore[arg-type]

    (trial, *_) = toys.search(study, evaluate, trials=4)
    assert trial.metrics["error"] == Reading(1.5, spread=0.25)


def test_a_mistake_in_the_users_code_does_not_spend_the_budget(tmp_path: Path) -> None:
    with (
        Study.create(tmp_path / "run", toys.IDENTITY) as study,
        pytest.raises(StudyError, match="ValueError: the user's mistake") as caught,
    ):
        toys.search(study, toys.broken, trials=100)
    assert "\n" not in str(caught.value)
    with Study.open(tmp_path / "run") as study:
        failed = study.trials()
        assert 3 <= len(failed) <= 8
        assert all("Traceback" in t.error for t in failed)
    # mended, and resumed: the same result as if it had never been wrong
    with Study.resume(tmp_path / "run", toys.IDENTITY) as study:
        mended = toys.result(toys.search(study))
    with Study.create(tmp_path / "other", toys.IDENTITY) as study:
        assert toys.result(toys.search(study)) == mended


def test_one_failure_among_few_trials(study: Study) -> None:
    with pytest.raises(StudyError, match="all of the first 2 trials"):
        toys.search(study, toys.broken, trials=2)


# --- map, once, events ------------------------------------------------------------------------


def test_map_keeps_the_order_and_evaluates_each_once(tmp_path: Path) -> None:
    seen: list[Candidate] = []
    shown: list[Trial] = []

    def evaluate(candidate: Candidate) -> dict[str, Reading]:
        seen.append(candidate)
        return toys.evaluate(candidate)

    wanted = toys.candidates(5)
    with Study.create(tmp_path / "run", toys.IDENTITY) as study:
        first = study.map("final", wanted[:3], evaluate, executor=Serial(), on_trial=shown.append)
        assert first == shown
        twice = [wanted[4], wanted[0], wanted[3], wanted[4]]
        got = study.map("final", twice, evaluate, executor=Serial())
        assert [t.candidate for t in got] == twice
        assert seen == [*wanted[:3], wanted[4], wanted[3]]
        assert study.map("none", [], evaluate, executor=Serial()) == []
        study.map("other", wanted[:1], evaluate, executor=Serial())
        assert len(seen) == 6, "phases are apart"
    with Study.resume(tmp_path / "run", toys.IDENTITY) as study:
        assert study.map("final", wanted[:3], toys.broken, executor=Serial()) == first


def test_map_gives_failed_trials_and_tries_again_when_all_failed(study: Study) -> None:
    wanted = toys.candidates(4)

    def partly(candidate: Candidate) -> dict[str, Reading]:
        if candidate["a"] == 1:
            raise KeyError("gone")
        return toys.evaluate(candidate)

    trials = study.map("final", wanted, partly, executor=Serial(retries=0))
    assert [t.state for t in trials] == ["done", "failed", "done", "done"]
    assert trials[1].attempts == 1
    assert study.map("final", wanted, toys.evaluate, executor=Serial()) == trials
    trials = study.map("all", wanted, toys.broken, executor=Serial())
    assert {t.state for t in trials} == {"failed"}
    trials = study.map("all", wanted, toys.evaluate, executor=Serial())
    assert {t.state for t in trials} == {"done"}


def test_once_computes_once_and_gives_plain_json(tmp_path: Path) -> None:
    calls: list[int] = []

    def measure() -> dict[str, Any]:
        calls.append(1)
        return {"t": (1, 2), "x": np.float64(0.5), "n": np.arange(2), "nan": math.nan}

    with Study.create(tmp_path / "run", toys.IDENTITY, seed=11) as study:
        first = study.once("table", measure)
        assert first["t"] == [1, 2]
        assert first["n"] == [0, 1]
        with pytest.raises(ZeroDivisionError):
            study.once("bad", lambda: 1 / 0)
        assert study.once("bad", lambda: None) is None, "a failed attempt records nothing"
        assert study.once("bad", lambda: 5) is None, "None is a value"
        with pytest.raises(TypeError, match="JSON"):
            study.once("object", object)
    with Study.resume(tmp_path / "run", toys.IDENTITY) as study:
        assert repr(study.once("table", measure)) == repr(first)
        assert study.seed == 11
    assert len(calls) == 1


def test_events_and_seconds_of_phases(study: Study) -> None:
    study.event("phase", name="search", seconds=1.5)
    study.event("note", text="é", kind_of="x")
    study.event("phase", name="search", seconds=2.0)
    assert study.phase_seconds() == {"search": 3.5}
    note = study.events()[1]
    assert (note["kind"], note["text"]) == ("note", "é")
    assert abs(note["time"] - time.time()) < 60


def test_phases_are_recorded_for_readers_and_not_mixed_up(study: Study) -> None:
    toys.search(study, trials=4)
    about = study.meta["phase/search"]
    assert Space.from_json(about["space"]) == toys.SPACE
    assert about["objectives"][0] == {"name": "error", "goal": "min"}
    with pytest.raises(StudyError, match="strategy") as caught:
        toys.search(study, strategy="random", trials=4)
    assert "nsga2" in str(caught.value)
    with pytest.raises(StudyError, match="at least 1"):
        toys.search(study, trials=0)


def test_only_the_newest_state_is_kept(study: Study) -> None:
    toys.search(study, trials=40)
    rows = study._ledger._all("SELECT number, state FROM asks ORDER BY number")
    assert [state is None for _, state in rows] == [True] * (len(rows) - 1) + [False]
    assert json.loads(rows[-1][1])["strategy"] == "nsga2"


@pytest.mark.parametrize("name", strategies.STRATEGIES)
@pytest.mark.parametrize("batch", [1, 16])
def test_every_strategy_searches_and_finds_the_same_again(
    tmp_path: Path, name: str, batch: int
) -> None:
    def strategy() -> Any:  # of a slow model, fewer fits
        if name != "gp":
            return name
        return strategies.make("gp", toys.SPACE, 3, startup=40, most=2)

    count = 24 if name == "gp" else 30
    results = []
    for run in "ab":
        with Study.create(tmp_path / run, toys.IDENTITY) as study:
            found = toys.search(study, strategy=strategy(), trials=count, batch=batch)
            results.append(toys.result(found))
    assert results[0] == results[1]
    assert len(results[0]) == count


def test_an_own_strategy_needs_only_ask_tell_state_load(study: Study) -> None:
    class Own(Strategy):
        name = "own"

        def ask(self, n: int) -> np.ndarray:
            return self.space.sample(n, self.rng)

        def tell(self, codes: np.ndarray, values: np.ndarray, violations: np.ndarray) -> None:
            assert values.shape == (len(codes), 2)

        def state(self) -> dict[str, Any]:
            return {"rng": self.rng.bit_generator.state}

        def load(self, state: dict[str, Any]) -> None:
            self.rng.bit_generator.state = state["rng"]

    assert len(toys.search(study, strategy=Own(toys.SPACE, 0), trials=20)) == 20


def test_prices_may_be_missing_for_limits_that_evaluate_gives(study: Study) -> None:
    def free(codes: np.ndarray) -> Metrics:
        return Metrics({"other": np.zeros(len(codes))}, [Metric("other")])

    def evaluate(candidate: Candidate) -> dict[str, Reading]:
        cost = float(sum(int(v) for v in candidate.values()))
        return {**toys.evaluate(candidate), "cost": Reading(cost)}

    trials = toys.search(study, evaluate, price=free, trials=20)
    assert any(t.violation > 0 for t in trials)
    assert all((t.violation > 0) == (t.metrics["cost"].value > 16) for t in trials)
