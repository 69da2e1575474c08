"""Every strategy passes the shipped suite, and the suite fails those that break its rules."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from espalier.solvers import strategies
from espalier.solvers.strategies import NSGA2, Random
from espalier.space import Linear, Space, choice, integer, ordinal, real
from espalier.testing import strategy as suite

MIXED = Space(
    [
        choice("a", "p", "q", "r"),
        integer("b", 0, 5),
        ordinal("c", 1, 2, 4, when={"a": ("p", "q")}),
        real("lr", 1e-4, 1e-1, log=True, when={"a": ("p",)}),
        integer("d", 0, 9),
    ],
    [Linear({"b": 1, "d": 1}, "<=", 9)],
)
WIDE = Space([integer(f"x{i}", 0, 99) for i in range(24)])

# rows that are random before a slow model takes part: its own tests let it begin earlier
OPTIONS: dict[str, dict[str, Any]] = {"gp": {"startup": 60}, "tpe": {"startup": 60}}


# of which the mean over five seeds takes half a minute and more; two tell the same
SEEDS = dict.fromkeys(("guided", "bohb", "reinforce", "mcts"), 2)
ROWS = {"guided": 96}  # of a model that takes longer with each


def make(name: str) -> suite.MakeStrategy:
    return lambda space, seed: strategies.make(name, space, seed, **OPTIONS.get(name, {}))


@pytest.mark.parametrize("name", strategies.STRATEGIES)
def test_every_strategy_passes_on_a_mixed_space(name: str) -> None:
    suite.check_strategy(make(name), MIXED, seeds=SEEDS.get(name, 5), rows=ROWS.get(name, 240))


@pytest.mark.parametrize("name", strategies.STRATEGIES)
@pytest.mark.parametrize("space", [suite.small_space(), WIDE], ids=["small", "wide"])
def test_every_strategy_passes_on_other_spaces(name: str, space: Space) -> None:
    made = make(name)
    suite.check_batches(made, space)
    suite.check_seed(made, space)
    suite.check_state(made, space, objectives=1 if space is WIDE else 2)  # the mixed space: both
    suite.check_refused(made, space)


class Repeats(Random):
    def ask(self, n: int) -> np.ndarray[Any, Any]:
        codes = super().ask(n)
        return np.concatenate([codes, codes[:1]])[-n:] if n > 1 else codes


class ForgetsGenerator(Random):
    def load(self, state: dict[str, Any]) -> None:
        mine = self.rng.bit_generator.state
        super().load(state)
        self.rng.bit_generator.state = mine


class GivesUp(NSGA2):
    def ask(self, n: int) -> np.ndarray[Any, Any]:
        codes = super().ask(n)
        broken = self.members is not None and not self.members.kept.any()
        return codes[:0] if broken else codes


class StopsEarly(Random):
    def ask(self, n: int) -> np.ndarray[Any, Any]:
        return super().ask(n) if len(self._seen) < 10 else self._seen.space.sample(0, self.rng)


class Unseeded(Random):
    def __init__(self, space: Space, seed: int = 0) -> None:
        super().__init__(space, 0)


class HoldsNan(Random):
    def state(self) -> dict[str, Any]:
        return {**super().state(), "best": float("nan")}


class ClaimsToLearn(Random):
    learns = True


@pytest.mark.parametrize(
    "kind", [Repeats, ForgetsGenerator, GivesUp, StopsEarly, Unseeded, HoldsNan, ClaimsToLearn]
)
def test_the_suite_catches(kind: type[strategies.Strategy]) -> None:
    with pytest.raises((AssertionError, ValueError)):
        suite.check_strategy(kind, MIXED)
