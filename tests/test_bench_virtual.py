"""Virtual time: workers, what a promotion costs, and tables whose epochs are a decision."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from espalier.bench.curves import with_epochs
from espalier.bench.drive import drive
from espalier.bench.table import Table
from espalier.bench.tables import load
from espalier.bench.virtual import simulate
from espalier.errors import EspalierError
from espalier.problem import Limit, Metric
from espalier.solvers.strategies import ASHA, BOHB, Hyperband, Random, Strategy, SuccessiveHalving
from espalier.space import Space, integer

LEVELS = (1, 3, 9)


def made(seconds: bool = True) -> Table:
    """400 candidates with curves of 9 epochs and 3 trainings, and unequal seconds an epoch."""
    rng = np.random.default_rng(0)
    space = Space([integer("x", 0, 19), integer("y", 0, 19)])
    codes = space.enumerate()
    final = 0.5 + 0.02 * codes[:, 0] + 0.001 * codes[:, 1] ** 1.5
    epochs = np.arange(1, 10)
    speed = rng.uniform(0.2, 1.0, len(codes))
    curve = final[:, None, None] - (speed[:, None] / epochs)[:, None, :]
    noise = rng.normal(0, 0.01, (2, len(codes), 3, 9))
    curves = {"val_acc": curve + noise[0], "test_acc": curve + noise[1]}
    return Table(
        name="made",
        space=space,
        codes=codes,
        columns={
            "val_acc": curves["val_acc"][:, 0, -1],
            "test_acc": curves["test_acc"][:, :, -1].mean(axis=1),
            "params": 10.0 + codes[:, 0],
        },
        about={
            "val_acc": Metric("val_acc", "", "max", "measured", "validation"),
            "test_acc": Metric("test_acc", "", "max", "measured", "test"),
            "params": Metric("params"),
        },
        validation="val_acc",
        test="test_acc",
        source="made for a test",
        curves=curves,
        epoch_seconds=1.0 + (codes[:, 1] % 5) if seconds else None,
        encode=_encode,
    )


def _encode(codes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return codes.astype(float)


class Listed(Strategy):
    """Asks given rows in turn; `holds` says at which asks it has nothing until one more is told."""

    name = "listed"

    def __init__(self, space: Space, rows: Any, holds: set[int] | None = None) -> None:
        super().__init__(space, 0)
        self.rows = np.asarray(rows, dtype=space.dtype)
        self.asked, self.told, self.holds = 0, [], holds or set()

    def ask(self, n: int) -> Any:
        if self.asked in self.holds and len(self.told) < self.asked:
            return self.rows[:0]
        out = self.rows[self.asked : self.asked + n]
        self.asked += len(out)
        return out

    def tell(self, codes: Any, values: Any, violations: Any) -> None:
        self.told += [tuple(int(c) for c in row) for row in codes]

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None:
        pass


# --- epochs as a decision ------------------------------------------------------------------------


def test_the_rows_of_a_table_with_epochs_are_read_off_its_curves() -> None:
    table = made()
    extended = with_epochs(table, LEVELS)
    assert len(extended) == 1200
    assert extended.space.names == ("x", "y", "epochs")
    for row in (0, 77, 399):
        for level, epochs in enumerate(LEVELS):
            candidate = {**table.space.decode(table.codes[[row]])[0], "epochs": epochs}
            found = int(extended.find(extended.space.encode([candidate]))[0])
            assert found == row * 3 + level
            assert extended.columns["val_acc"][found] == table.curves["val_acc"][row, 0, epochs - 1]
            mean = table.curves["test_acc"][row, :, epochs - 1].mean()
            assert extended.columns["test_acc"][found] == pytest.approx(mean)
            assert extended.columns["params"][found] == table.columns["params"][row]
            assert extended.epoch_seconds[found] == epochs * table.epoch_seconds[row]
    last = np.arange(2, 1200, 3)
    assert np.allclose(extended.columns["val_acc"][last], table.columns["val_acc"])
    features = extended.encode(extended.codes[:6])
    assert features.shape == (6, 3)
    assert features[:3, -1] == pytest.approx(np.log(LEVELS))


def test_a_full_training_costs_one_where_no_seconds_are_known() -> None:
    extended = with_epochs(made(seconds=False), LEVELS)
    assert extended.epoch_seconds[:3] == pytest.approx([1 / 9, 3 / 9, 1])


def test_tables_without_curves_and_bad_levels_are_refused() -> None:
    table = made()
    for levels in ((), (0, 3), (3, 10), (1.5,)):
        with pytest.raises(EspalierError, match="from 1 to 9"):
            with_epochs(table, levels)
    with pytest.raises(EspalierError, match="no learning curves"):
        with_epochs(with_epochs(table, LEVELS), LEVELS)


# --- workers -------------------------------------------------------------------------------------


def test_two_workers_by_hand() -> None:
    """Seconds an epoch by y % 5 + 1, nine epochs: 9, 18, 27, 9 on two workers."""
    table = made()
    strategy = Listed(table.space, [[0, 0], [0, 1], [0, 2], [1, 0]])
    trace = simulate(strategy, table, workers=2, queries=4)
    # the first ends at 9 and its worker takes 27 seconds more; the second at 18, then 9 more
    assert trace.times.tolist() == [9, 18, 27, 36]
    assert strategy.told == [(0, 0), (0, 1), (1, 0), (0, 2)]
    assert trace.values[:, 0].tolist() == (-table.columns["val_acc"][trace.rows]).tolist()


def test_a_worker_with_nothing_to_do_waits_for_the_next_result() -> None:
    table = made()
    strategy = Listed(table.space, [[0, 1], [0, 0], [1, 0]], holds={2})
    trace = simulate(strategy, table, workers=2, queries=9)
    assert trace.times.tolist() == [9, 18, 27]
    assert strategy.told == [(0, 0), (0, 1), (1, 0)]


def test_a_promoted_candidate_pays_the_difference_only() -> None:
    extended = with_epochs(made(), LEVELS)
    rows = extended.space.encode(
        [{"x": 3, "y": 1, "epochs": e} for e in LEVELS] + [{"x": 4, "y": 1, "epochs": 9}]
    )
    trace = simulate(Listed(extended.space, rows), extended, workers=1, queries=4)
    assert trace.times.tolist() == [2, 6, 18, 36]
    # what still runs can't be continued: both levels at once are two trainings
    trace = simulate(Listed(extended.space, rows[:2]), extended, workers=2, queries=2)
    assert trace.times.tolist() == [2, 6]


def test_results_of_one_moment_are_told_before_anyone_asks() -> None:
    table = made()
    rows = [[x, 0] for x in range(6)]

    class Noting(Listed):
        def ask(self, n: int) -> Any:
            noted.append(len(self.told))
            return super().ask(n)

    noted: list[int] = []
    trace = simulate(Noting(table.space, rows), table, workers=3, queries=6)
    assert trace.times.tolist() == [9, 9, 9, 18, 18, 18]
    assert noted == [0, 0, 0, 3, 3, 3]


def test_seconds_end_a_run_and_what_still_runs_is_not_told() -> None:
    table = made()
    strategy = Listed(table.space, [[0, 0], [0, 4], [1, 0]])
    trace = simulate(strategy, table, workers=1, seconds=60)
    assert trace.times.tolist() == [9, 54]
    assert strategy.told == [(0, 0), (0, 4)]


def test_one_worker_is_one_query_after_the_other() -> None:
    table = made()
    limits = [Limit("params", 20.0)]
    trace = simulate(Random(table.space, 3), table, workers=1, queries=50, limits=limits)
    serial = drive(Random(table.space, 3), table, 50, limits=limits)
    assert np.array_equal(trace.rows, serial.rows)
    assert np.array_equal(trace.violations, serial.violations)
    assert np.allclose(trace.times, serial.times)
    assert (trace.violations > 0).any()


@pytest.mark.parametrize("kind", [SuccessiveHalving, Hyperband, ASHA, BOHB])
def test_a_run_does_not_hang_on_how_fast_the_strategy_is(kind: type[Strategy]) -> None:
    class Slow(kind):  # type: ignore[misc, valid-type]
        def ask(self, n: int) -> Any:
            time.sleep(0.001 * (n + len(self.results.rows) % 3))
            return super().ask(n)

    table = with_epochs(made(), LEVELS)
    plain, slow = (
        simulate(each(table.space, 4), table, workers=5, queries=120) for each in (kind, Slow)
    )
    assert json.dumps(plain.to_json()["rows"]) == json.dumps(slow.to_json()["rows"])
    assert np.array_equal(plain.times, slow.times)
    assert (np.diff(plain.times) >= 0).all()


def test_time_is_the_same_for_all_workers_together() -> None:
    """The work of W workers is at most W times the time, and all of it until the last ask."""
    table = with_epochs(made(), LEVELS)
    for workers in (1, 4, 16, 64):
        trace = simulate(ASHA(table.space, 0), table, workers=workers, queries=400)
        done: dict[int, float] = {}
        for row in trace.rows.tolist():
            seconds = float(table.epoch_seconds[row])
            done[row // 3] = max(done.get(row // 3, 0.0), seconds)
        work = sum(done.values())
        assert work <= workers * trace.times[-1] + 1e-6
        # all are busy until the last ask, and whoever is last takes at most a full training
        assert work >= workers * (trace.times[-1] - float(table.epoch_seconds.max()))


def test_more_workers_end_sooner_and_end_the_small_space_wholly() -> None:
    small = Space([integer("x", 0, 3), integer("y", 0, 3)])
    whole = made()
    kept = whole.find(whole.space.encode([dict(c) for c in small.decode(small.enumerate())]))
    table = with_epochs(
        Table(
            "small",
            small,
            small.enumerate(),
            {k: v[kept] for k, v in whole.columns.items()},
            whole.about,
            "val_acc",
            "test_acc",
            "made",
            {k: v[kept] for k, v in whole.curves.items()},
            None if whole.epoch_seconds is None else whole.epoch_seconds[kept],
        ),
        LEVELS,
    )
    ends = []
    for workers in (1, 3, 50):
        trace = simulate(Hyperband(table.space, 0), table, workers=workers, seconds=1e9)
        assert set((trace.rows // 3).tolist()) == set(range(16))
        assert sum(trace.rows % 3 == 2) == 16
        ends.append(trace.times[-1])
    assert ends[0] > ends[1] > ends[2]


def test_bad_input() -> None:
    table = made()
    strategy = Random(table.space, 0)
    with pytest.raises(EspalierError, match="at least 1 worker, got 0"):
        simulate(strategy, table, workers=0, queries=1)
    with pytest.raises(EspalierError, match="give one of them"):
        simulate(strategy, table, workers=1)
    with pytest.raises(EspalierError, match="queries must be above 0"):
        simulate(strategy, table, workers=1, queries=0)
    with pytest.raises(EspalierError, match="ended in time"):
        simulate(strategy, table, workers=1, seconds=0.5)


# --- real curves ---------------------------------------------------------------------------------


@pytest.mark.data
def test_the_table_of_recurrent_cells_is_what_was_published(real_data: Path) -> None:
    table = load("nb_nlp")
    assert len(table) == 345
    assert table.curves["val_loss"].shape == (345, 1, 50)
    losses = table.columns["val_loss"]
    assert np.isnan(losses).sum() == 4  # the trainings that the file says diverged
    assert np.exp(np.nanmin(losses)) == pytest.approx(96.5, abs=0.05)
    assert np.nanmin(table.columns["test_loss"]) < np.nanmin(losses)
    assert table.encode is not None
    features = table.encode(table.codes)
    assert np.array_equal(features[:, :7].sum(axis=1), features[:, 7])
    assert features[:, :7].sum(axis=0).tolist() == [1183, 444, 362, 271, 95, 60, 39]
    assert 130 < table.epoch_seconds.min() < table.epoch_seconds.max() < 1200


@pytest.mark.data
def test_halving_finds_better_cells_than_random_search_in_the_same_time(real_data: Path) -> None:
    table = load("nb_nlp")
    few, full = with_epochs(table, (2, 6, 17, 50)), with_epochs(table, (50,))
    seconds = 20 * 50 * float(table.epoch_seconds.mean()) / 4

    def found(each: Table, kind: type[Strategy]) -> float:
        out = []
        for seed in range(6):
            trace = simulate(kind(each.space, seed), each, workers=4, seconds=seconds)
            out.append(each.columns["test_loss"][trace.rows[np.nanargmin(trace.values[:, 0])]])
        return float(np.mean(out))

    assert found(few, ASHA) < found(full, Random) - 0.05
