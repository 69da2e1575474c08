"""The protocol: equal budgets, chosen by validation, reported on test, resumed, the same in processes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from bench_toys import SPACE, features, toy
from espalier.bench import significance
from espalier.bench.bootstrap import mean_band
from espalier.bench.drive import drive
from espalier.bench.entrants import Entrant, entrants
from espalier.bench.improvement import improvement, relative_improvement
from espalier.bench.protocol import race
from espalier.bench.regret import chosen, judge, over_time, queries_to_best, regret
from espalier.bench.told import told
from espalier.bench.trace import Trace
from espalier.bench.volume import dominated, share, volume
from espalier.errors import EspalierError, StudyError
from espalier.problem import hypervolume, limits
from espalier.solvers.strategies import Random, make

TABLE = toy()


class Hopeless(Random):
    """Asks the worst rows first: a strategy that must be said to be worse than random search."""

    name = "hopeless"

    def ask(self, n: int) -> Any:
        order = np.argsort(TABLE.columns["val_acc"])
        rows = TABLE.codes[order]
        start = len(self._seen)
        found = rows[start : start + n]
        self._seen.add(found)
        return found


class Knows(Hopeless):
    """Asks the best row first."""

    name = "knows"

    def ask(self, n: int) -> Any:
        order = np.argsort(-TABLE.columns["val_acc"])
        start = len(self._seen)
        found = TABLE.codes[order][start : start + n]
        self._seen.add(found)
        return found


def trace_of(rows: list[int], times: list[float] | None = None) -> Trace:
    n = len(rows)
    when = np.arange(1.0, n + 1) if times is None else np.array(times)
    return Trace(np.array(rows), np.zeros((n, 1)), np.zeros(n), when)


def test_regret_chooses_by_validation_and_reports_test() -> None:
    view = told(TABLE)
    found = judge(TABLE, view)
    rows = np.random.default_rng(0).permutation(256)[:40].tolist()
    curve = regret(trace_of(rows), found)
    val, test = TABLE.columns["val_acc"], TABLE.columns["test_acc"]
    for q in range(1, 41):  # written out: the best by validation so far, its test
        best = max(rows[:q], key=lambda r: val[r])
        assert curve[q - 1] == pytest.approx(test.max() - test[best])
    assert (curve >= 0).all()
    assert not (np.diff(curve) <= 0).all(), "test regret may rise: the choice is by validation"
    assert queries_to_best(trace_of(rows), found) == float("inf")
    assert queries_to_best(trace_of([3, int(val.argmax()), 7]), found) == 2


def test_what_breaks_a_limit_is_never_chosen() -> None:
    params = TABLE.columns["params"]
    bounds = limits({"params": float(np.quantile(params, 0.3))})
    view = told(TABLE, limits=bounds)
    found = judge(TABLE, view)
    over, under = int(params.argmax()), int(params.argmin())
    picks = chosen(trace_of([over, over, under, over]), found)
    assert picks.tolist() == [-1, -1, 2, 2]
    curve = regret(trace_of([over, over, under, over]), found)
    test = TABLE.columns["test_acc"]
    kept = params <= bounds[0].bound
    assert curve[0] == pytest.approx(test[kept].max() - test.min())
    assert curve[-1] == pytest.approx(test[kept].max() - test[under])
    with pytest.raises(EspalierError, match="no row of toy keeps params <= 5"):
        told(TABLE, limits=limits({"params": 5}))
    half = told(TABLE, limits=limits({"params": "50%"}))
    assert half.problem.limits[0].bound == pytest.approx(params.max() / 2)


def test_what_reports_never_chooses() -> None:
    with pytest.raises(EspalierError, match=r"test_acc is of test, .* take val_acc"):
        race(TABLE, "random", 5, 1, objectives=["test_acc"])
    with pytest.raises(EspalierError, match="reports and never chooses"):
        race(TABLE, "random", 5, 1, within={"test_acc": ">= 60"})


def test_curves_are_read_as_steps_in_time() -> None:
    curve = np.array([5.0, 3.0, 1.0])
    read = over_time(np.array([1.0, 4.0, 6.0]), curve, np.array([0.5, 1.0, 3.9, 4.0, 9.0]), 8.0)
    assert read.tolist() == [8.0, 5.0, 5.0, 3.0, 1.0]


@pytest.mark.parametrize("batch", [1, 7])
def test_drive_tells_what_the_table_holds(batch: int) -> None:
    heard: list[tuple[Any, Any, Any]] = []

    class Listens(Random):
        def tell(self, codes: Any, values: Any, violations: Any) -> None:
            heard.append((codes, values, violations))
            super().tell(codes, values, violations)

    bounds = limits({"params": 4000.0})
    trace = drive(Listens(SPACE, 3), TABLE, 40, batch=batch, limits=bounds)
    assert len(trace) == 40
    assert [len(h[0]) for h in heard] == ([1] * 40 if batch == 1 else [7, 7, 7, 7, 7, 5])
    codes = np.concatenate([h[0] for h in heard])
    assert np.array_equal(TABLE.codes[trace.rows], codes)
    assert np.array_equal(trace.values[:, 0], -TABLE.columns["val_acc"][trace.rows])
    params = TABLE.columns["params"][trace.rows]
    assert np.allclose(trace.violations, np.maximum(params - 4000, 0) / 4000)
    assert np.allclose(trace.times, np.cumsum(params / 1000))


def test_drive_ends_where_the_space_does() -> None:
    trace = drive(Random(SPACE, 0), TABLE, 1000, batch=50)
    assert sorted(trace.rows.tolist()) == list(range(256))


def test_hypervolume_agrees_with_the_slower_one_and_ends_at_1() -> None:
    rng = np.random.default_rng(1)
    for m in (2, 3):
        points = rng.uniform(0, 1.2, size=(60, m))
        clipped = points[(points < 1).all(1)]
        assert dominated(np.minimum(points, 1.0)) == pytest.approx(hypervolume(clipped, np.ones(m)))
    view = told(TABLE, ["test_acc", "params"])
    space = volume(TABLE, view)
    everything = trace_of(list(range(256)))
    found = share(everything, space, np.array([1, 50, 256]))
    assert found[-1] == pytest.approx(1.0)
    assert (np.diff(found) >= 0).all(), "chosen and reported by one column, it only grows"


def test_the_front_is_chosen_by_validation_and_measured_by_test() -> None:
    view = told(TABLE, ["val_acc", "params"])
    space = volume(TABLE, view)
    rows = np.random.default_rng(2).permutation(256)[:30]
    val, test, cost = (TABLE.columns[n] for n in ("val_acc", "test_acc", "params"))
    front = [r for r in rows if not any(
        val[o] >= val[r] and cost[o] <= cost[r] and (val[o] > val[r] or cost[o] < cost[r])
        for o in rows)]  # fmt: skip
    scale = lambda x: (x - x.min()) / (x.max() - x.min())  # noqa: E731
    points = np.stack([scale(-test), scale(cost)], 1)
    expected = hypervolume(points[front], [1, 1]) / hypervolume(points, [1, 1])
    assert share(trace_of(rows.tolist()), space, np.array([30]))[0] == pytest.approx(expected)


# --- statistics against scipy and by hand ------------------------------------------------------


def test_the_paired_test_is_exact_for_few_seeds_and_near_scipy_for_many() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.4, 1, 9), rng.normal(0, 1, 9)
    d = a - b
    flips = [abs(np.dot(s, d)) for s in itertools.product((-1, 1), repeat=9)]
    exact = np.mean(np.array(flips) >= abs(d.sum()) - 1e-12)
    assert significance.paired(a, b) == pytest.approx(exact)
    a, b = rng.normal(0.25, 1, 60), rng.normal(0, 1, 60)
    theirs = stats.permutation_test(
        (a - b,), np.mean, permutation_type="samples", n_resamples=20000, rng=1
    ).pvalue
    assert significance.paired(a, b) == pytest.approx(theirs, abs=0.015)
    assert significance.paired(a, a) == 1.0


def test_holm_by_hand() -> None:
    adjusted = significance.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert adjusted == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})


def test_ranks_and_the_critical_difference_of_the_textbook() -> None:
    losses = {"a": np.array([1.0, 1, 1]), "b": np.array([2.0, 2, 1]), "c": np.array([3.0, 3, 3])}
    found = significance.ranks(losses)
    assert found.mean == pytest.approx({"a": 7 / 6, "b": 11 / 6, "c": 3.0})
    assert found.p == pytest.approx(stats.friedmanchisquare(*losses.values()).pvalue)
    # Demsar (2006): k = 4 classifiers on N = 14 data sets, q = 2.569, CD = 1.25
    losses = {n: np.random.default_rng(i).normal(size=14) for i, n in enumerate("abcd")}
    assert significance.ranks(losses).critical == pytest.approx(1.25, abs=0.005)


def test_bands_cover_the_mean_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(3)
    hits = 0
    for i in range(200):
        band = mean_band(rng.normal(size=40), seed=i)
        hits += band.low <= 0 <= band.high
    assert 0.88 <= hits / 200 <= 0.99


def test_relative_improvement_by_hand() -> None:
    assert relative_improvement(94.5, [90.0] * 8) == pytest.approx(5.0)
    assert relative_improvement(18.0, [20.0] * 8, maximised=False) == pytest.approx(10.0)
    rng = np.random.default_rng(0)
    band = improvement(rng.normal(94, 0.1, 50), rng.normal(90, 0.1, 50))
    assert band.low < 100 * 4 / 90 < band.high
    with pytest.raises(ValueError, match="at least 8"):
        improvement([94.0], [90.0] * 7)


# --- races -------------------------------------------------------------------------------------


def test_a_race_says_who_is_better_and_who_is_not() -> None:
    racing = [
        "random",
        Entrant("knows", Knows),
        Entrant("hopeless", Hopeless),
        Entrant("again", Random),
    ]
    result = race(TABLE, racing, 20, 12).to_json()
    assert result["table"] == "toy"
    assert result["seeds"] == 12
    assert list(result["regret"]) == ["random", "knows", "hopeless", "again"]
    floor = result["ceiling"]["regret"]
    assert result["regret"]["knows"] == pytest.approx(floor)
    assert result["significance"]["knows"]["better"]
    assert result["significance"]["hopeless"]["worse"]
    said = "\n".join(result["verdicts"])
    assert "knows is better than random search at equal budget (20 queries)" in said
    assert "hopeless is worse than random search" in said
    assert "again is not better than random search" in said
    # the same seeds draw the same rows: no difference at all
    assert result["regret"]["again"] == result["regret"]["random"]
    assert result["queries_to_best"]["knows"] == {"median": 1.0, "found": 1.0}
    assert result["curves"]["random"]["queries"][-1] == 20
    assert result["curves"]["random"]["mean"][-1] == result["regret"]["random"]
    assert result["improvement"]["strategies"]["knows"]["mean"] > 0
    json.dumps(result, allow_nan=False)


def test_random_search_is_always_there_and_few_seeds_prove_nothing() -> None:
    result = race(TABLE, "evolution:population=5,sample=2", 12, 3).to_json()
    assert list(result["regret"]) == ["random", "evolution:population=5,sample=2"]
    assert "no difference can be significant" in result["verdicts"][-1]


def test_names_with_options() -> None:
    found = entrants("random, evolution:population=30,sample=10 ,predictor" if _has("guided") else
                     "random, evolution:population=30,sample=10")  # fmt: skip
    assert [e.name for e in found][:2] == ["random", "evolution:population=30,sample=10"]
    assert found[1].options == {"population": 30, "sample": 10}
    if _has("guided"):
        assert found[2].strategy == "guided"
    for text, hint in (
        ("evoluton", "evolution"),
        ("evolution:populaton=3", "population"),
        ("evolution:population", "evolution:population=30"),
        ("evolution:population=few", "population of evolution is int or None, got 'few'"),
        ("evolution:population=2.5", "int or None, got 2.5"),
        ("hyperband:eta=true", "eta of hyperband is int, got True"),
        ("hyperband:eeta=4", "Did you mean 'eta'"),
        ("random:seed=3", "unknown option of random 'seed'"),
    ):
        with pytest.raises(EspalierError, match=hint):
            race(TABLE, text, 5, 1)


def _has(name: str) -> bool:
    from espalier.solvers.strategies import STRATEGIES

    return name in STRATEGIES


def test_features_of_the_table_go_to_who_takes_them() -> None:
    taken: list[Any] = []

    class Takes(Random):
        def __init__(self, space: Any, seed: int = 0, features: Any = None) -> None:
            taken.append(features)
            super().__init__(space, seed)

    Entrant("takes", Takes).make(TABLE, 0)
    assert taken == [TABLE.encode]


def test_a_limit_goes_to_who_screens_by_it() -> None:
    bounds = limits({"params": 4000.0})
    made = Entrant("eeea", "eeea", {"population": 10}).make(TABLE, 0, bounds)
    first = made.ask(10)
    assert (TABLE.columns["params"][TABLE.find(first)] <= 4000).all()
    result = race(TABLE, "eeea:population=10,nsga2:population=10", 40, 6, within=bounds).to_json()
    assert result["limits"] == [{"metric": "params", "op": "<=", "bound": 4000.0}]


def test_processes_give_the_same_and_a_stopped_race_goes_on(tmp_path: Path) -> None:
    here = race(TABLE, "random,nsga2", 15, 4).to_json()
    there = race(TABLE, "random,nsga2", 15, 4, jobs=2, out=tmp_path).to_json()
    _same(here, there)
    lines = (tmp_path / "runs.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 8
    # killed while it wrote the fifth run
    (tmp_path / "runs.jsonl").write_text("".join(lines[:5]) + lines[5][:40])
    told_of: list[tuple[str, int, int]] = []
    again = race(
        TABLE, "random,nsga2", 15, 4, out=tmp_path, progress=lambda *a: told_of.append(a)
    ).to_json()
    _same(here, again)
    assert told_of[0] == ("", 4, 8)
    assert told_of[-1][1:] == (8, 8)
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 9
    more = race(TABLE, "random,nsga2,evolution", 15, 4, out=tmp_path).to_json()
    assert more["regret"]["nsga2"] == here["regret"]["nsga2"]
    with pytest.raises(StudyError, match="queries=15"):
        race(TABLE, "random", 16, 4, out=tmp_path)
    with pytest.raises(StudyError, match="data="):
        race(toy(noise=0.4), "random", 15, 4, out=tmp_path)
    other = [Entrant("nsga2", "nsga2", {"population": 8})]
    with pytest.raises(StudyError, match=r"'nsga2' as nsga2\(\), now it is nsga2\(population=8\)"):
        race(TABLE, other, 15, 4, out=tmp_path)
    (tmp_path / "runs.jsonl").write_text(lines[0] + "{\n" + lines[1])
    with pytest.raises(StudyError, match=r"line 2 of .* is damaged"):
        race(TABLE, "random", 15, 4, out=tmp_path)


def _same(a: dict[str, Any], b: dict[str, Any]) -> None:
    plain = [{k: v for k, v in x.items() if k != "overhead_ms"} for x in (a, b)]
    assert plain[0] == plain[1]


def test_two_objectives_are_judged_by_hypervolume() -> None:
    result = race(
        TABLE, "random,nsga2:population=8", 60, 10, objectives=["val_acc", "params"]
    ).to_json()
    assert result["judged_by"] == "hypervolume"
    for curve in result["hypervolume"].values():
        assert 0 < curve["mean"][0] < curve["mean"][-1] <= 1
    assert "hypervolume" in result["verdicts"][0]


def test_strategies_that_learn_beat_random_on_an_easy_table() -> None:
    names = "random,evolution:population=8,sample=4,nsga2:population=8"
    result = race(toy(noise=0.0), names, 40, 30).to_json()
    assert all(test["better"] for test in result["significance"].values())


def test_simulated_workers_end_sooner_and_learn_later() -> None:
    one, four = (
        race(TABLE, "random,nsga2:population=8", 40, 6, workers=n).to_json() for n in (1, 4)
    )
    ends = [x["time"]["random"]["seconds"][-1] for x in (one, four)]
    assert ends[1] < 0.4 * ends[0]
    assert one["regret"]["random"] == four["regret"]["random"]  # the same rows, told or not


def test_early_stopping_gets_the_same_time_and_is_read_in_it() -> None:
    table = toy(curves=True)
    result = race(table, "random,halving,hyperband", 30, 6).to_json()
    assert result["in_time"] == ["halving", "hyperband"]
    assert result["curves"]["halving"]["queries"] == result["curves"]["random"]["queries"]
    floor = result["ceiling"]["regret"]
    for name in ("halving", "hyperband"):
        curve = result["curves"][name]["mean"]
        assert 0 <= curve[-1] < curve[0]
        assert f"{name} stops trainings early" in " ".join(result["notes"])
    assert floor >= 0
    whole = float(np.mean(table.epoch_seconds) * 9)
    for traces in race(table, "halving", 30, 2).runs.values():
        for (
            trace
        ) in traces:  # no one gets more time than 30 average trainings, but for a query's end
            assert trace.times[-1] <= 30 * whole * 1.2
    plain = race(TABLE, "halving", 12, 2).to_json()
    assert "no learning curves" in " ".join(plain["notes"])


@pytest.mark.parametrize("name", ["random", "evolution"])
def test_the_same_seed_is_the_same_run(name: str) -> None:
    runs = [drive(make(name, SPACE, 7), TABLE, 30).rows.tolist() for _ in range(2)]
    assert runs[0] == runs[1]


def test_the_toy_passes_the_suite_for_tables_and_broken_ones_do_not() -> None:
    from dataclasses import replace

    from espalier.testing import check_table

    check_table(TABLE)
    broken = {
        "one goal": replace(
            TABLE, about={**TABLE.about, "test_acc": replace(TABLE.about["test_acc"], goal="min")}
        ),
        "no gaps": replace(
            TABLE, columns={**TABLE.columns, "test_acc": np.full(len(TABLE.codes), np.nan)}
        ),
        "depend on the batch": replace(TABLE, encode=lambda c: features(c) - features(c).mean(0)),
    }
    for rule, table in broken.items():
        with pytest.raises(AssertionError, match=rule):
            check_table(table)


def test_a_seed_counts_once() -> None:
    with pytest.raises(EspalierError, match="every seed is given once"):
        race(TABLE, "random", 5, [0, 0])
