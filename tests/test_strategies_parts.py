"""The parts of strategies: slots, populations, what was seen, names and states."""

from __future__ import annotations

import json

import numpy as np
import pytest

from espalier.errors import EspalierError, SpaceError
from espalier.solvers import strategies
from espalier.solvers.strategies import NSGA2, Evolution, Random
from espalier.solvers.strategies.fresh import Seen
from espalier.solvers.strategies.population import Population, pack, unpack
from espalier.solvers.strategies.slots import Best, CrossAndMutate, Mutate, Tournament, Youngest
from espalier.space import Linear, Space, integer, real

SPACE = Space([integer(f"x{i}", 0, 7) for i in range(6)])
RNG = np.random.default_rng


def population(values: list[list[float]], violations: list[float]) -> Population:
    codes = SPACE.sample(len(values), RNG(0))
    return Population.told(codes, np.array(values), np.array(violations))


def test_order_is_deb_then_crowding_then_age() -> None:
    p = population(
        [[2, 2], [np.nan, np.nan], [0, 3], [np.nan, np.nan], [1, 2], [3, 0], [np.nan, np.nan]],
        [0, 0.5, 0, 0, 0, 0, 0.1],
    )
    # the front's ends, its middle; dominated; least broken, more broken; failed
    assert p.best_first.tolist() == [2, 5, 4, 0, 6, 1, 3]


def test_survivors() -> None:
    p = population([[5], [1], [4], [2], [np.nan], [3]], [0, 0, 0, 0, 1, 0])
    assert Best()(p, 3).tolist() == [1, 3, 5]
    assert Youngest()(p, 3).tolist() == [2, 3, 5]
    # broken rows fill what is left, the least broken first, and never more
    q = population([[1], [np.nan], [np.nan], [np.nan]], [0, 0.2, 0.9, 0.2])
    assert Youngest()(q, 2).tolist() == [0, 3]
    assert Youngest()(q, 3).tolist() == [0, 1, 3]
    assert Youngest()(q, 9).tolist() == [0, 1, 2, 3]


def test_tournament_prefers_the_better_as_much_as_its_size_says() -> None:
    p = population([[float(v)] for v in (3, 0, 2, 1)], [0, 0, 0, 0])
    for size in (1, 2, 5):
        won = Tournament(size)(p, 40_000, RNG(1))
        share = np.bincount(won, minlength=4) / len(won)
        # place i of 4 wins when all drawn are at i or behind, and one is at i
        expected = [((4 - i) ** size - (3 - i) ** size) / 4**size for i in range(4)]
        assert share[[1, 3, 2, 0]] == pytest.approx(expected, abs=0.01)


def test_children_come_from_their_parents() -> None:
    p = population([[0.0], [1.0]], [0, 0])
    near = Mutate()(SPACE, p, Tournament(5), 500, RNG(2))
    changed = (near[:, None, :] != p.codes[None]).sum(2).min(1)
    assert changed.min() >= 1
    assert changed.mean() < 2
    mixed = CrossAndMutate(cross=1.0, rate=0.0)(SPACE, p, Tournament(1), 500, RNG(3))
    assert ((mixed == p.codes[0]) | (mixed == p.codes[1])).all()
    assert len(SPACE.unique(mixed)) > 10
    copies = CrossAndMutate(cross=0.0, rate=0.0)(SPACE, p, Tournament(1), 50, RNG(4))
    assert len(SPACE.unique(copies)) == 2


def test_pack_is_exact_and_only_for_numbers() -> None:
    arrays = [
        SPACE.sample(40, RNG(0)),
        np.array([[np.nan, np.inf], [-0.0, 1e-300]]),
        np.zeros((0, 6), dtype=np.int8),
        np.asfortranarray(np.arange(12).reshape(3, 4)),
    ]
    for array in arrays:
        back = unpack(json.loads(json.dumps(pack(array), allow_nan=False)))
        assert back.dtype == array.dtype
        assert back.tobytes() == np.ascontiguousarray(array).tobytes()
        assert back.shape == array.shape
    with pytest.raises(ValueError, match="numbers"):
        unpack({"dtype": "|O", "shape": [1], "data": ""})


def test_seen_finds_the_last_row_of_a_listed_space() -> None:
    space = Space([integer("a", 0, 99), integer("b", 0, 99)])
    seen = Seen(space)
    everything = space.enumerate()
    rows = RNG(0).permutation(len(everything))
    seen.add(everything[rows[:-3]])
    found = seen.fresh(10, RNG(1), lambda k: everything[:k])
    assert sorted(map(tuple, found)) == sorted(map(tuple, everything[rows[-3:]]))
    assert len(seen.fresh(1, RNG(1), lambda k: everything[:k])) == 0


def test_seen_lists_a_large_space_that_constraints_make_small() -> None:
    pairs = [Linear({f"x{i}": 1, f"x{i + 1}": 1}, "<=", 1) for i in (0, 2, 4, 6)]
    space = Space([integer(f"x{i}", 0, 9) for i in range(8)], pairs)
    assert space.size > 10**7
    strategy = Random(space, 0)
    asked = sum(len(strategy.ask(20)) for _ in range(6))
    assert asked == len(space.enumerate()) == 3**4


def test_constraints_that_nothing_keeps_are_said() -> None:
    space = Space([integer("x", 0, 9)], [Linear({"x": 1}, "<=", -1)])
    for name in strategies.STRATEGIES:
        with pytest.raises(SpaceError, match="constraints"):
            strategies.make(name, space, 0).ask(3)


def test_a_space_with_a_real_decision_never_ends() -> None:
    space = Space([real("x", 0, 1)])
    strategy = NSGA2(space, 0)
    for _ in range(20):
        codes = strategy.ask(10)
        assert len(codes) == 10
        strategy.tell(codes, codes.astype(float), np.zeros(10))


@pytest.mark.parametrize("kind", [Evolution, NSGA2])
def test_the_first_population_has_both_corners(kind: type[NSGA2]) -> None:
    strategy = kind(SPACE, 0, population=12)
    first = strategy.ask(5)
    assert (first[0] == 0).all()
    assert (first[1] == 7).all()
    later = strategy.ask(7)
    assert len(SPACE.unique(np.concatenate([first, later]))) == 12


def test_the_population_is_as_large_as_the_first_batch() -> None:
    for n, expected in ((50, 50), (8, 8), (1, 20)):
        strategy = NSGA2(SPACE, 0)
        codes = strategy.ask(n)
        strategy.tell(codes, np.zeros((n, 1)), np.zeros(n))
        assert strategy.size == expected
    assert NSGA2(SPACE, 0, population=7).size == 7


def test_evolution_forgets_the_oldest_and_nsga2_the_worst() -> None:
    for kind, remembered in ((Evolution, False), (NSGA2, True)):
        strategy = kind(SPACE, 0, population=8)
        best = strategy.ask(8)
        strategy.tell(best, np.zeros((8, 1)), np.zeros(8))
        for _ in range(3):
            codes = strategy.ask(8)
            strategy.tell(codes, np.ones((8, 1)), np.zeros(8))
        assert strategy.members is not None
        kept = {row.tobytes() for row in np.ascontiguousarray(strategy.members.codes)}
        first = {row.tobytes() for row in np.ascontiguousarray(best)}
        assert bool(kept & first) is remembered
        assert len(strategy.members) == 8


def test_a_row_told_twice_counts_once() -> None:
    strategy = NSGA2(SPACE, 0, population=8)
    codes = strategy.ask(4)
    for _ in range(2):
        strategy.tell(codes, np.arange(4.0)[:, None], np.zeros(4))
    strategy.tell(codes[[0, 0]], np.zeros((2, 1)), np.zeros(2))
    assert strategy.members is not None
    assert len(strategy.members) == 4


def test_known_rows_may_be_told_before_the_first_ask() -> None:
    known = SPACE.sample(30, RNG(5))
    known = known[SPACE.unique(known)]
    for name in strategies.STRATEGIES:
        few = {"most": 1} if name == "gp" else {}  # fits
        strategy = strategies.make(name, SPACE, 0, **few)
        strategy.tell(known, np.ones((len(known), 1)), np.zeros(len(known)))
        asked = strategy.ask(40)
        assert len(SPACE.unique(np.concatenate([known, asked]))) == len(known) + 40


def test_names_and_bad_input() -> None:
    made = strategies.make("nsga2", SPACE, 3, population=5)
    assert isinstance(made, NSGA2)
    assert made.size == 5
    with pytest.raises(EspalierError, match="'nsga2'"):
        strategies.make("nsga", SPACE)
    with pytest.raises(EspalierError, match="at least 2"):
        NSGA2(SPACE, 0, population=1)
    with pytest.raises(EspalierError, match="at least 1"):
        Evolution(SPACE, 0, sample=0)
    with pytest.raises(EspalierError, match=r"'random'.*'nsga2'"):
        NSGA2(SPACE, 0).load(Random(SPACE, 0).state())
    with pytest.raises(EspalierError, match="'nsga2'"):
        Random(SPACE, 0).load(NSGA2(SPACE, 0).state())
    with pytest.raises(AttributeError, match="Nsga3"):
        _ = strategies.Nsga3


def test_the_state_of_a_large_study_is_compact() -> None:
    strategy = Random(SPACE, 0)
    rows = sum(len(strategy.ask(1000)) for _ in range(20))
    assert rows == 20_000
    assert len(json.dumps(strategy.state())) < rows * len(SPACE)
