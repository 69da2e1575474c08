"""Checks that any strategy must pass: `check_strategy(MyStrategy, space)`.

Each check is a function that raises `AssertionError` with the rule that was broken.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.problem import hypervolume
from espalier.solvers.strategies import Random, Strategy
from espalier.space import Forbid, Space, choice, integer, ordinal

MakeStrategy = Callable[[Space, int], Strategy]
Codes = NDArray[Any]
Array = NDArray[np.float64]
Score = Callable[[Codes], tuple[Array, Array]]


def check_strategy(
    make_strategy: MakeStrategy,
    space: Space,
    *,
    learns: bool | None = None,
    seeds: int = 5,
    rows: int = 240,
) -> None:
    """Every check, on `space` and on small spaces of its own.

    `make_strategy(space, seed)` gives a new strategy. `learns` says whether it claims to be better
    than random search on an easy problem, within `rows` and on average over `seeds`; without it, the
    strategy's attribute `learns` does.
    """
    if learns is None:
        learns = bool(getattr(make_strategy(space, 0), "learns", False))
    check_batches(make_strategy, space)
    check_exhaustion(make_strategy)
    check_seed(make_strategy, space)
    for objectives in (1, 2):
        check_state(make_strategy, space, objectives)
    check_refused(make_strategy, space)
    if learns:
        check_better_than_random(make_strategy, seeds, rows)
        check_front_better_than_random(make_strategy, seeds, rows)
        check_finds_feasible(make_strategy, seeds, rows)


# --- spaces and problems -----------------------------------------------------------------------


def small_space() -> Space:
    """A space with a condition and a constraint: 2 * (1 + 3) * 2 rows less those forbidden."""
    return Space(
        [
            choice("first", "a", "b"),
            choice("kind", "plain", "rich"),
            ordinal("size", 1, 2, 3, when={"kind": ("rich",)}),
            integer("count", 1, 2),
        ],
        [Forbid({"first": "b", "size": 2})],
    )


def easy_space() -> Space:
    """Ten decisions of eight options."""
    return Space([integer(f"x{i}", 0, 7) for i in range(10)])


def distances(space: Space, objectives: int) -> Score:
    """An easy problem on any space: the distance to one random row an objective."""
    targets = space.sample(objectives, np.random.default_rng(99))

    def score(codes: Codes) -> tuple[Array, Array]:
        return space.distance(codes, targets), np.zeros(len(codes))

    return score


def drive(strategy: Strategy, score: Score, asks: int, n: int) -> tuple[Codes, Array, Array]:
    """Asks and tells; gives all rows with their values and violations."""
    rows = []
    for _ in range(asks):
        codes = strategy.ask(n)
        values, violations = score(codes)
        strategy.tell(codes, values, violations)
        rows.append((codes, values, violations))
    codes, values, violations = (np.concatenate(part) for part in zip(*rows, strict=True))
    return codes, values, violations


# --- checks ------------------------------------------------------------------------------------


def check_batches(make_strategy: MakeStrategy, space: Space) -> None:
    """Any batch size, also mixed: valid canonical rows, none twice, as many as asked."""
    score = distances(space, 1)
    for sizes in ([1] * 12, [8] * 4, [50, 50], [1, 7, 3, 20, 1]):
        strategy = make_strategy(space, 1)
        asked = np.zeros((0, len(space)), dtype=space.dtype)
        for n in sizes:
            codes = strategy.ask(n)
            assert codes.ndim == 2, f"ask({n}) must give an array (n, d), got {codes.shape}"
            assert codes.shape[1] == len(space), f"rows have {codes.shape[1]} columns"
            assert codes.dtype == space.dtype, f"codes are {space.dtype}, got {codes.dtype}"
            assert len(codes) <= n, f"ask({n}) gave {len(codes)} rows"
            assert space.valid(codes).all(), "every row that is asked must be valid"
            assert np.array_equal(space.canonical(codes), codes), "rows must be canonical"
            asked = np.concatenate([asked, codes])
            assert len(space.unique(asked)) == len(asked), "no row may be asked twice"
            if space.size > 4 * len(asked) and not space.constraints:
                assert len(codes) == n, f"ask({n}) gave {len(codes)} although the space has more"
            strategy.tell(codes, *score(codes))


def check_exhaustion(make_strategy: MakeStrategy) -> None:
    """Asks every row of a small space once, and then none."""
    space = small_space()
    every = {str(c) for c in space.decode(space.enumerate())}
    score = distances(space, 1)
    for n in (1, 4, 100):
        strategy = make_strategy(space, 2)
        seen: list[str] = []
        for _ in range(len(every) + 1):
            codes = strategy.ask(n)
            seen += [str(c) for c in space.decode(codes)]
            if len(codes) == 0:
                break
            strategy.tell(codes, *score(codes))
        assert sorted(seen) == sorted(every), (
            f"in batches of {n}, {len(seen)} rows ({len(set(seen))} different) were asked of a "
            f"space that has {len(every)}"
        )
        assert len(strategy.ask(n)) == 0, "an exhausted space gives an empty ask, again and again"


def check_seed(make_strategy: MakeStrategy, space: Space) -> None:
    """The seed decides: equal seeds ask the same, others ask something else."""
    score = distances(space, 1)
    first, again, other = (drive(make_strategy(space, s), score, 4, 6)[0] for s in (3, 3, 4))
    assert np.array_equal(first, again), "two strategies of one seed must ask the same rows"
    if space.size > 100:
        assert first.shape != other.shape or not np.array_equal(first, other), (
            "strategies of different seeds asked the same rows"
        )


def check_state(make_strategy: MakeStrategy, space: Space, objectives: int) -> None:
    """`state` is plain JSON at any moment, and `load` continues exactly, whatever the new seed."""
    score = distances(space, objectives)
    for asks in (0, 1, 5):
        strategy = make_strategy(space, 5)
        if asks:
            drive(strategy, score, asks, 6)
        _check_continues(make_strategy, strategy, score, pending=None)
        # and between an ask and its tell, which is when a study records it
        _check_continues(make_strategy, strategy, score, pending=strategy.ask(6))


def _check_continues(
    make_strategy: MakeStrategy, strategy: Strategy, score: Score, pending: Codes | None
) -> None:
    text = json.dumps(strategy.state(), allow_nan=False)
    twins = []
    for seed in (5, 6):
        twin = make_strategy(strategy.space, seed)
        twin.load(json.loads(text))
        assert json.dumps(twin.state(), allow_nan=False) == text, "load then state must be equal"
        if pending is not None:
            twin.tell(pending, *score(pending))
        twins.append(drive(twin, score, 4, 5)[0])
    assert np.array_equal(twins[0], twins[1]), (
        "a loaded state must continue the same whatever the seed"
    )
    if pending is not None:
        strategy.tell(pending, *score(pending))
        original = drive(strategy, score, 4, 5)[0]
        assert np.array_equal(original, twins[0]), "a loaded state must continue as the original"


def check_refused(make_strategy: MakeStrategy, space: Space) -> None:
    """Goes on when everything was refused or failed, or when nothing is told at all."""
    told: list[tuple[float, float]] = [
        (np.nan, 0.5),  # refused before evaluation
        (np.nan, np.inf),  # refused, its price unknown
        (np.nan, 0.0),  # failed
        (1.0, 2.0),  # evaluated, and breaks a limit
    ]
    for objectives in (1, 2):
        for value, violation in told:
            strategy = make_strategy(space, 7)

            def score(
                codes: Codes,
                value: float = value,
                violation: float = violation,
                m: int = objectives,
            ) -> tuple[Array, Array]:
                return np.full((len(codes), m), value), np.full(len(codes), violation)

            codes, _, _ = drive(strategy, score, 5, 6)
            assert space.valid(codes).all(), "rows must stay valid when all is refused"
            assert len(codes) > 0, "a strategy must go on when all is refused"
            json.dumps(strategy.state(), allow_nan=False)
    silent = make_strategy(space, 7)
    codes = np.concatenate([silent.ask(5) for _ in range(3)])
    assert len(space.unique(codes)) == len(codes), "rows were repeated when nothing was told"


def check_better_than_random(make_strategy: MakeStrategy, seeds: int = 5, rows: int = 240) -> None:
    """After `rows` of an easy problem, nearer to the best than random search."""
    for n in (1, 12):
        mine, chance = (_nearest(make, n, seeds, rows) for make in (make_strategy, Random))
        assert mine < 0.8 * chance, (
            f"in batches of {n} the best is {mine:.3f} on average, random search's {chance:.3f}"
        )


@functools.cache  # what random search does is asked for again and again
def _nearest(make: MakeStrategy, n: int, seeds: int, rows: int) -> float:
    space = easy_space()
    score = distances(space, 1)
    return float(
        np.mean([drive(make(space, s), score, rows // n, n)[1].min() for s in range(seeds)])
    )


def check_front_better_than_random(
    make_strategy: MakeStrategy, seeds: int = 5, rows: int = 240
) -> None:
    """With two objectives, a larger hypervolume than random search."""
    mine, chance = _volume(make_strategy, seeds, rows), _volume(Random, seeds, rows)
    assert mine > chance, f"hypervolume {mine:.4f} on average, random search's {chance:.4f}"


@functools.cache
def _volume(make: MakeStrategy, seeds: int, rows: int) -> float:
    space = easy_space()
    score = distances(space, 2)
    fronts = [drive(make(space, s), score, rows // 12, 12)[1] for s in range(seeds)]
    return float(np.mean([hypervolume(values, [0.6, 0.6]) for values in fronts]))


def check_finds_feasible(make_strategy: MakeStrategy, seeds: int = 5, rows: int = 240) -> None:
    """Within twice the rows, led by the violations of refused rows, finds rows that keep a limit that few rows keep."""
    mine, chance = _kept(make_strategy, seeds, rows), _kept(Random, seeds, rows)
    assert mine > 5 * chance + 5, (
        f"of {2 * rows} rows {mine:.1f} kept the limit on average, of random search {chance:.1f}"
    )


@functools.cache
def _kept(make: MakeStrategy, seeds: int, rows: int) -> float:
    space = easy_space()
    middle = np.full((1, len(space)), 4, dtype=space.dtype)

    def score(codes: Codes) -> tuple[Array, Array]:
        far = space.distance(codes, middle)[:, 0]
        violations = np.maximum(far - 0.1, 0.0)
        return np.where(violations > 0, np.nan, far)[:, None], violations

    found = [drive(make(space, s), score, rows // 6, 12)[2] <= 0 for s in range(seeds)]
    return float(np.mean([rows.sum() for rows in found]))
