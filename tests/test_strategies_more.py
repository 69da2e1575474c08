"""Grid, local search, constrained evolution, REINFORCE and tree search: what each of them does."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from espalier.errors import EspalierError
from espalier.problem import ranks
from espalier.solvers.strategies import EEEA, MCTS, Grid, LocalSearch, Reinforce
from espalier.solvers.strategies.bins import Bins
from espalier.solvers.strategies.controller import Controller
from espalier.solvers.strategies.mcts import _Descents
from espalier.solvers.strategies.merit import merit
from espalier.solvers.strategies.moves import Moves
from espalier.solvers.strategies.population import Population
from espalier.space import Space, choice, integer, ordinal, real

RNG = np.random.default_rng
CELLS = Space([choice(f"op{i}", *"abcde") for i in range(6)])
NONE = np.zeros(0)


# --- grid -------------------------------------------------------------------------------------


def test_a_stopped_grid_has_tried_every_option_about_as_often() -> None:
    for n in (25, 100, 777):
        codes = Grid(CELLS, 1).ask(n)
        for column in codes.T:
            counts = np.bincount(column, minlength=5)
            assert counts.min() >= n / 5 - 5
            assert counts.max() <= n / 5 + 5


def test_a_grid_goes_from_coarse_to_fine_and_ends() -> None:
    space = Space([integer("a", 0, 8), ordinal("b", 1, 2, 3, 4, 5), choice("c", "x", "y", "z")])
    codes = Grid(space, 3).ask(1000)
    assert len(codes) == 9 * 5 * 3
    # the ends; then the middle too; then the quarters
    assert set(codes[: 2 * 2 * 3, 0]) == {0, 8}
    assert set(codes[: 3 * 3 * 3, 0]) == {0, 4, 8}
    assert set(codes[: 3 * 3 * 3, 1]) == {0, 2, 4}
    assert set(codes[: 5 * 5 * 3, 0]) == {0, 2, 4, 6, 8}


def test_a_grid_of_real_decisions_has_the_levels_asked_for() -> None:
    space = Space([real("lr", 1e-4, 1.0, log=True), real("x", -1, 1), choice("c", 1, 2)])
    strategy = Grid(space, 0, levels=5)
    codes = np.concatenate([strategy.ask(7) for _ in range(20)])
    assert len(codes) == 5 * 5 * 2
    assert np.unique(codes[:, 0]) == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1.0])
    assert np.unique(codes[:, 1]) == pytest.approx([-1, -0.5, 0, 0.5, 1])
    endless = Grid(space, 0)
    assert sum(len(endless.ask(100)) for _ in range(10)) == 1000
    with pytest.raises(EspalierError, match="at least 2 levels"):
        Grid(space, 0, levels=1)


# --- local search -----------------------------------------------------------------------------


def hamming(a: Any, b: Any) -> int:
    return int((a != b).sum())


def test_local_search_climbs_until_no_neighbour_is_better_and_starts_anew() -> None:
    score = RNG(5).random(5**6)
    radix = 5 ** np.arange(6)
    strategy = LocalSearch(CELLS, 2, draws=4)
    best, left, climbs = None, 4, 0
    asked: set[bytes] = set()
    for _ in range(400):
        row = strategy.ask(1)[0]
        value = score[row @ radix]
        if left > 0:
            left -= 1
        elif best is not None and hamming(row, best[1]) != 1:
            # it left: every neighbour of the best row was asked
            around = CELLS.neighbours(best[1][None])
            assert all(r.tobytes() in asked for r in np.ascontiguousarray(around))
            best, left, climbs = None, 3, climbs + 1
        asked.add(np.ascontiguousarray(row).tobytes())
        if best is None or value < best[0]:
            best = (value, row)
        strategy.tell(row[None], np.array([[value]]), np.zeros(1))
    assert climbs >= 3


def test_pareto_local_search_asks_around_the_front() -> None:
    values = RNG(6).random((5**6, 2))
    radix = 5 ** np.arange(6)
    strategy = LocalSearch(CELLS, 3, draws=5)
    codes = strategy.ask(5)
    told = values[codes @ radix]
    strategy.tell(codes, told, np.zeros(5))
    for _ in range(60):
        row = strategy.ask(1)
        front = codes[ranks(told) == 0]
        assert min(hamming(row[0], r) for r in front) == 1
        value = values[row @ radix]
        strategy.tell(row, value, np.zeros(1))
        codes, told = np.concatenate([codes, row]), np.concatenate([told, value])


def test_local_search_is_led_by_violations_and_not_by_failures() -> None:
    strategy = LocalSearch(CELLS, 0, draws=3)
    codes = strategy.ask(3)
    strategy.tell(codes, np.full((3, 1), np.nan), np.array([0.5, 0.1, np.inf]))
    assert all(hamming(row, codes[1]) == 1 for row in strategy.ask(6))
    failed = LocalSearch(CELLS, 0, draws=3)
    failed.tell(failed.ask(3), np.full((3, 1), np.nan), np.zeros(3))
    assert len(failed.ask(10)) == 10
    with pytest.raises(EspalierError, match="at least 1 row"):
        LocalSearch(CELLS, 0, draws=0)


# --- constrained evolution --------------------------------------------------------------------


def price(codes: Any) -> Any:
    return codes.sum(axis=1).astype(float)


def test_the_first_population_is_under_the_threshold() -> None:
    strategy = EEEA(CELLS, 0, population=30, price=price, threshold=7)
    first = np.concatenate([strategy.ask(1), strategy.ask(19), strategy.ask(10)])
    assert price(first).max() <= 7
    assert price(CELLS.sample(500, RNG(0))).mean() > 11
    assert len(CELLS.unique(first)) == 30
    strategy.tell(first, price(first)[:, None] * -1, np.zeros(30))
    # the threshold is for the start alone
    for _ in range(6):
        codes = strategy.ask(30)
        strategy.tell(codes, -price(codes)[:, None], np.zeros(30))
    assert price(codes).mean() > 12


def test_where_nothing_is_that_cheap_the_cheapest_draws_do() -> None:
    codes = EEEA(CELLS, 0, population=20, price=price, threshold=-1).ask(20)
    assert len(codes) == 20
    assert price(codes).mean() < 7


def test_without_a_price_rows_that_break_limits_are_replaced_at_the_start() -> None:
    strategy = EEEA(CELLS, 1, population=10)
    drawn = []
    for _ in range(40):
        codes = strategy.ask(5)
        beyond = np.maximum(price(codes) - 8, 0)
        room = strategy.members is None or (
            int(strategy.members.kept.sum()) < 10 and strategy._asked <= 40
        )
        drawn.append(room)
        strategy.tell(codes, price(codes)[:, None], beyond)
    assert strategy.members is not None
    assert strategy.members.kept.all()
    assert sum(drawn) > 2  # asks at the start: more than the two that fill a population
    assert not drawn[-1]
    with pytest.raises(EspalierError, match="give both"):
        EEEA(CELLS, 0, threshold=3)


# --- merit ------------------------------------------------------------------------------------


def test_merit_is_the_share_of_rows_behind() -> None:
    codes = CELLS.sample(5, RNG(0))
    one = Population.told(
        codes, [[3.0], [1.0], [1.0], [np.nan], [9e9]], np.array([0, 0, 0, 0.5, 0])
    )
    assert merit(one, np.ones(1)) == pytest.approx([0.5, 0.875, 0.875, 0.0, 0.25])
    two = Population.told(codes[:3], [[0.0, 5.0], [1.0, 0.0], [2.0, 9.0]], np.zeros(3))
    # places: (0, .5), (.5, 0), (1, 1); by the first objective alone, then by the second
    assert merit(two, np.array([1.0, 0.0])) == pytest.approx([1.0, 0.5, 0.0])
    assert merit(two, np.array([0.0, 1.0])) == pytest.approx([0.5, 1.0, 0.0])
    alone = Population.told(codes[:1], [[2.0]], np.zeros(1))
    assert merit(alone, np.ones(1)) == pytest.approx([0.5])


# --- tree search ------------------------------------------------------------------------------

MIXED = Space(
    [
        ordinal("n", 1, 2, 4, when={"kind": ("long",)}),
        choice("kind", "short", "long"),
        integer("w", 0, 10),
        real("lr", 1e-3, 1.0, log=True),
    ]
)


def test_moves_lead_back_to_the_codes() -> None:
    moves = Moves(MIXED, bisect=True)
    codes = MIXED.sample(200, RNG(1))
    table = moves.of(codes)
    for row, made in zip(codes, table, strict=True):
        for j in range(3):
            low, high = 0.0, moves.width(j)
            for level in moves.levels[j]:
                if made[level] < 0:
                    continue
                if not moves.halved[j]:
                    low, high = float(made[level]), made[level] + 1.0
                    continue
                middle = (low + high) // 2
                low, high = (middle, high) if made[level] else (low, middle)
            if j == 0 and row[1] == 0:  # inactive: no moves
                assert (made[list(moves.levels[0])] == -1).all()
            else:
                assert (low, high) == (row[j], row[j] + 1)
        share = np.log(row[3] / 1e-3) / np.log(1e3)
        bits = made[list(moves.levels[3])]
        assert int("".join(map(str, bits)), 2) == math.floor(share * 64)
    assert moves.turns.order.index(1) < moves.turns.order.index(0)


def test_the_move_is_that_of_the_upper_confidence_bound() -> None:
    made = np.array([0, 0, 0, 1, 1, 2])
    reward = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.1])
    chosen = []
    for explore in (0.0, 0.7, 1.5):
        bounds = [
            np.mean(reward[made == a]) + explore * math.sqrt(math.log(6) / (made == a).sum())
            for a in range(3)
        ]
        descents = _Descents(MCTS(CELLS, 0, explore=explore), NONE)
        chosen.append(descents._pick(made, reward, 3))
        assert chosen[-1] == int(np.argmax(bounds))
        assert descents._pick(made, reward, 4) == 3  # never made: comes first
    assert chosen == [0, 0, 2]


def test_tree_search_goes_where_it_is_good_and_counts_what_is_waited_for() -> None:
    strategy = MCTS(CELLS, 0, rollout="uniform")
    for _ in range(150):
        codes = strategy.ask(1)
        strategy.tell(codes, (codes[:, :1] != 3) + 0.01 * codes[:, 1:2], np.zeros(1))
    assert strategy._told is not None
    late = strategy._told.codes[-100:, 0]
    assert (late == 3).mean() > 0.6  # 0.2 by chance
    # a batch spreads: each row of it is a visit for the next
    batch = MCTS(CELLS, 0).ask(10)
    assert np.bincount(batch[:, 0], minlength=5).tolist() == [2] * 5
    with pytest.raises(EspalierError, match="'average' or 'uniform'"):
        MCTS(CELLS, 0, rollout="greedy")


# --- REINFORCE --------------------------------------------------------------------------------


def test_bins_are_equal_parts_and_lead_back() -> None:
    space = Space([integer("w", 0, 99), real("lr", 1e-3, 1.0, log=True), choice("c", *range(30))])
    bins = Bins(space, 16)
    assert bins.sizes == [16, 16, 30]
    drawn = RNG(0).integers(0, 16, size=(3000, 3))
    codes = np.stack([bins.codes(j, drawn[:, j], RNG(j)) for j in range(3)], axis=1)
    assert (bins.of(codes)[0] == drawn).all()
    assert set(codes[:, 0]) == set(range(100))


def test_what_is_written_has_the_odds_that_are_learnt_from() -> None:
    space = Space([choice("a", 0, 1, 2), choice("b", 0, 1, when={"a": (1, 2)})])
    bins = Bins(space, 16)
    controller = Controller(bins, hidden=8, rate=0.1, seed=4)
    rows = space.enumerate()
    choices, made = bins.of(rows)
    for _ in range(12):  # away from the even start
        controller.learn(choices, made, np.array([2.0, -1.0, 1.0, 0.5, -1.5]), 0.0)
    with torch.no_grad():
        tokens = np.zeros(choices.shape, dtype=np.int64)
        tokens[:, 1] = 1 + choices[:, 0]
        log_odds = controller._log_odds(torch.from_numpy(tokens)).numpy()
    each = np.take_along_axis(log_odds, choices[..., None], axis=2)[..., 0]
    expected = np.exp((each * made).sum(axis=1))
    assert expected.sum() == pytest.approx(1.0, abs=1e-5)
    assert expected.max() > 2 * expected.min()
    drawn = controller.write(40_000, RNG(0))
    counts = (space.keys(drawn)[:, None] == space.keys(rows)).sum(axis=0)
    assert counts / 40_000 == pytest.approx(expected, abs=0.012)


def test_reinforce_leaves_no_trace_and_needs_no_luck() -> None:
    before = torch.random.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    count = torch.get_num_threads()
    strategy = Reinforce(CELLS, 0)
    sums = []
    for _ in range(60):
        codes = strategy.ask(4)
        sums.append(codes.sum(axis=1, keepdims=True).astype(float))
        strategy.tell(codes, sums[-1], np.zeros(len(codes)))
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()  # noqa: NPY002
    assert torch.get_num_threads() == count
    # it finds the few good rows soon; 12 by chance
    assert np.mean(sums[10:30]) < 8
    with pytest.raises(EspalierError, match="levels=1"):
        Reinforce(CELLS, 0, levels=1)
