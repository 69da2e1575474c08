"""Checks that any multi-fidelity strategy must pass: `check_fidelity(MyStrategy)`.

They run beside `check_strategy`, on a space with the decision "epochs". Each check is a function
that raises `AssertionError` with the rule that was broken.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.solvers.strategies import Random, Strategy
from espalier.solvers.strategies.levels import Levels, extended
from espalier.space import Space, choice, integer

MakeStrategy = Callable[[Space, int], Strategy]
Codes = NDArray[Any]
Array = NDArray[np.float64]
Score = Callable[[Codes], tuple[Array, Array]]

EPOCHS = (1, 3, 9, 27)
_ROWS = 300  # of a run


def check_fidelity(make_strategy: MakeStrategy) -> None:
    """Every check. `make_strategy(space, seed)` gives a new strategy that promotes 1 in 3."""
    for batch in (1, 7):
        check_order(make_strategy, batch)
    check_share(make_strategy)
    check_failures(make_strategy)
    check_pending_state(make_strategy)
    check_exhausts(make_strategy)
    check_better_at_equal_time(make_strategy)


# --- spaces and problems -----------------------------------------------------------------------


def curve_space() -> Space:
    """10,000 candidates, and 1, 3, 9 or 27 epochs of each."""
    inner = [integer(f"x{i}", 0, 9) for i in range(3)]
    return extended(Space([*inner, choice("kind", *"abcdefghij")]), EPOCHS)


def curves(space: Space) -> tuple[Score, Callable[[Codes], Array]]:
    """A problem with learning curves, and the loss that each candidate ends with.

    After e epochs the loss is what it ends with, the distance to a random row, plus a share of its
    own that falls with sqrt(e): so the order after few epochs is like the last, and not the same.
    """
    levels = Levels(space)
    target = levels.inner.sample(1, np.random.default_rng(99))
    amounts = np.array(levels.amounts)

    def final(codes: Codes) -> Array:
        return levels.inner.distance(levels.strip(codes), target)[:, 0]

    def score(codes: Codes) -> tuple[Array, Array]:
        inner = levels.strip(codes).astype(float)
        own = 0.5 + 0.5 * np.sin(12.9898 * inner @ np.arange(1.0, inner.shape[1] + 1))
        loss = final(codes) + 0.4 * own / np.sqrt(amounts[levels.of(codes)])
        return loss[:, None], np.zeros(len(codes))

    return score, final


class Watch:
    """Asks and tells, and notes of every candidate which levels were asked and told."""

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self.levels = Levels(strategy.space)
        self.asked: dict[bytes, list[int]] = {}
        self.told: dict[bytes, set[int]] = {}

    def ask(self, n: int) -> Codes:
        """n rows; each must be the next level of its candidate, whose last was told."""
        codes = self.strategy.ask(n)
        space = self.strategy.space
        assert space.valid(codes).all(), "every row that is asked must be valid"
        assert len(codes) <= n, f"ask({n}) gave {len(codes)} rows"
        at = self.levels.of(codes)
        assert (at >= 0).all(), "every row must be at one of the levels in use"
        for row, level in zip(self.levels.strip(codes), at.tolist(), strict=True):
            key = row.tobytes()
            before = self.asked.setdefault(key, [])
            if before:
                assert level == before[-1] + 1, (
                    f"a candidate asked at level {before[-1]} must be asked at the next, "
                    f"got {level}"
                )
                assert before[-1] in self.told.get(key, set()), (
                    "a candidate is promoted only after its result is told"
                )
            before.append(level)
        return codes

    def tell(self, codes: Codes, score: Score) -> None:
        """The results of rows asked before."""
        at = self.levels.of(codes).tolist()
        for row, level in zip(self.levels.strip(codes), at, strict=True):
            self.told.setdefault(row.tobytes(), set()).add(level)
        self.strategy.tell(codes, *score(codes))

    def count(self, level: int) -> int:
        """How many candidates were asked at a level."""
        return sum(level in levels for levels in self.asked.values())

    def promoted(self, level: int) -> int:
        """How many of those asked at a level went on to the next."""
        return sum(level in levels and level + 1 in levels for levels in self.asked.values())


# --- checks ------------------------------------------------------------------------------------


def check_order(make_strategy: MakeStrategy, batch: int) -> None:
    """Level by level, however large the asks are and in whatever order results come."""
    space = curve_space()
    score, _ = curves(space)
    watch = Watch(make_strategy(space, 1))
    rng = np.random.default_rng(0)
    waiting = watch.levels.at(watch.levels.inner.sample(0, rng), 0)
    for _ in range(_ROWS // batch):
        codes = watch.ask(batch)
        assert len(codes) == batch, f"ask({batch}) gave {len(codes)} although the space has more"
        waiting = np.concatenate([waiting, codes])
        if len(waiting) > 2 * batch or batch == 1:
            now = rng.permutation(len(waiting)) < len(waiting) - batch // 2
            watch.tell(waiting[now][::-1], score)
            waiting = waiting[~now]
    assert watch.count(watch.levels.top) > 0, "no candidate reached the highest level"


def check_share(make_strategy: MakeStrategy) -> None:
    """One in three of a level goes on: with room for a rung that is not finished."""
    space = curve_space()
    score, _ = curves(space)
    watch = Watch(make_strategy(space, 2))
    for _ in range(_ROWS):
        watch.tell(watch.ask(1), score)
    for level in range(watch.levels.top):
        there, on = watch.count(level), watch.promoted(level)
        room = 1 + 2 * np.sqrt(there)
        assert abs(on - there / 3) <= room, (
            f"of {there} candidates at {EPOCHS[level]} epochs {on} went on, not about a third"
        )


def check_failures(make_strategy: MakeStrategy) -> None:
    """Who failed, or breaks a limit, is never promoted; the others are."""
    space = curve_space()
    plain, _ = curves(space)
    watch = Watch(make_strategy(space, 3))
    bad: set[bytes] = set()

    def score(codes: Codes) -> tuple[Array, Array]:
        values, violations = plain(codes)
        inner = watch.levels.strip(codes)
        kind = inner.astype(int).sum(axis=1) % 4
        values[kind == 1] = np.nan  # failed
        values[kind == 2] = -1.0  # looks best, and breaks a limit
        violations[kind == 2] = 0.5
        values[kind == 3] = np.nan  # refused
        violations[kind == 3] = 0.1
        bad.update(row.tobytes() for row in inner[kind > 0])
        return values, violations

    for _ in range(_ROWS):
        watch.tell(watch.ask(1), score)
    assert all(len(levels) == 1 for key, levels in watch.asked.items() if key in bad), (
        "a candidate that failed or breaks a limit was promoted"
    )
    assert any(len(levels) > 1 for levels in watch.asked.values()), "nobody was promoted"


def check_pending_state(make_strategy: MakeStrategy) -> None:
    """A state with rows that still run continues exactly, in whatever order they end."""
    space = curve_space()
    score, _ = curves(space)
    for rows in (0, 20, 90):
        strategy = make_strategy(space, 4)
        for _ in range(rows):
            codes = strategy.ask(1)
            strategy.tell(codes, *score(codes))
        waiting = strategy.ask(9)
        text = json.dumps(strategy.state(), allow_nan=False)
        copy = make_strategy(space, 5)
        copy.load(json.loads(text))
        assert json.dumps(copy.state(), allow_nan=False) == text, "load then state must be equal"
        for _ in range(20):
            waiting = waiting[::-1]
            for each in (strategy, copy):
                each.tell(waiting[:3], *score(waiting[:3]))
            first, second = strategy.ask(3), copy.ask(3)
            assert np.array_equal(first, second), "a loaded state must continue as the original"
            waiting = np.concatenate([waiting[3:], first])


def check_exhausts(make_strategy: MakeStrategy) -> None:
    """Of a small space every candidate is asked, and all that keep the limits reach the top."""
    inner = Space([integer("x", 0, 4), integer("y", 0, 3)])
    space = extended(inner, (1, 3, 9))
    score, _ = curves(space)
    for batch in (1, 5):
        watch = Watch(make_strategy(space, 6))
        for _ in range(100):
            codes = watch.ask(batch)
            if len(codes) == 0:
                break
            watch.tell(codes, score)
        assert len(watch.asked) == inner.size, "not every candidate was asked"
        assert all(levels[-1] == 2 for levels in watch.asked.values()), (
            "an ask was empty although candidates could still be promoted"
        )


def check_better_at_equal_time(make_strategy: MakeStrategy) -> None:
    """After the time of 30 full trainings, the best that was trained to the end is nearer to the
    best there is than random search's (5 seeds)."""
    space = curve_space()
    score, final = curves(space)
    levels = Levels(space)
    budget = 30.0 * EPOCHS[-1]

    def spend(strategy: Strategy) -> float:
        spent, best, loss = 0.0, np.inf, np.inf
        while spent < budget:
            codes = strategy.ask(1)
            level = int(levels.of(codes)[0])
            new = level == 0 or levels.strip(codes)[0].tobytes() not in begun
            spent += EPOCHS[level] - (0 if new else EPOCHS[level - 1])
            begun.add(levels.strip(codes)[0].tobytes())
            values, violations = score(codes)
            if level == levels.top and values[0, 0] < best and spent <= budget:
                best, loss = values[0, 0], final(codes)[0]
            strategy.tell(codes, values, violations)
        return float(loss)

    mine, chance = [], []
    for seed in range(5):
        begun: set[bytes] = set()
        mine.append(spend(make_strategy(space, seed)))
        begun.clear()
        chance.append(spend(_Full(space, seed)))
    assert np.mean(mine) < np.mean(chance), (
        f"at equal virtual time the best is {np.mean(mine):.3f} on average, random search's "
        f"{np.mean(chance):.3f}"
    )


class _Full(Random):
    """Random search that trains every candidate to the end."""

    def __init__(self, space: Space, seed: int) -> None:
        self.levels = Levels(space)
        super().__init__(self.levels.inner, seed)

    def ask(self, n: int) -> Codes:
        """n random candidates at the highest level."""
        return self.levels.at(super().ask(n), self.levels.top)

    def tell(self, codes: Codes, values: Array, violations: Array) -> None:
        """Remembers nothing: rows are known from the asks."""
