"""Few rows go another way through the space than many: the same laws hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from espalier.space import Space, choice, few, integer, ordinal, real

SPACES = {
    "plain": Space([choice("a", *range(5)), ordinal("b", 1, 2, 3), integer("c", 0, 1)]),
    "conditional": Space(
        [
            choice("kind", "x", "y", "z"),
            integer("n", 0, 4, when={"kind": ("x", "y")}),
            choice("k", 3, 5, 7, when={"n": (1, 2, 3)}),
        ]
    ),
    "real": Space([choice("kind", "x", "y"), real("r", 0, 1, when={"kind": ("x",)})]),
    "wide": Space([integer(f"x{i}", 0, 99) for i in range(24)]),
}


def bit_by_bit(work: Callable[[Any], Any], codes: Any, size: int) -> Any:
    """The results of small tables, put together."""
    return np.concatenate([work(codes[i : i + size]) for i in range(0, len(codes), size)])


@pytest.mark.parametrize("name", SPACES)
def test_keys_and_validity_are_those_of_many(name: str) -> None:
    space = SPACES[name]
    codes = space.sample(3000, np.random.default_rng(0))
    wild = codes.copy()
    wild[::3] += np.random.default_rng(1).integers(-2, 3, size=wild[::3].shape).astype(wild.dtype)
    assert few.few(codes[:7])
    assert not few.few(codes)
    assert (bit_by_bit(space.keys, codes, 7) == space.keys(codes)).all()
    assert (bit_by_bit(space.valid, wild, 7) == space.valid(wild)).all()
    assert not space.valid(wild).all()


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("rate", [None, 0.4])
def test_mutation_changes_as_much_as_of_many(name: str, rate: float | None) -> None:
    space = SPACES[name]
    rng = np.random.default_rng(0)
    codes = space.sample(6000, rng)
    once = space.mutate(codes, rng, rate)
    often = bit_by_bit(lambda rows: space.mutate(rows, rng, rate), codes, 10)
    assert space.valid(often).all()
    assert (space.canonical(often) == often).all()
    one, two = (once != codes), (often != codes)
    assert two.mean(axis=0) == pytest.approx(one.mean(axis=0), abs=0.035)
    if rate is None:
        assert two.any(axis=1).all()
    for j, decision in enumerate(space.decisions):
        if 1 < decision.count < 9:  # to each other option alike
            counts = [
                np.bincount(s[:, j].astype(int), minlength=decision.count) for s in (once, often)
            ]
            assert counts[1] / 6000 == pytest.approx(counts[0] / 6000, abs=0.035)


def test_crossing_takes_from_both_alike() -> None:
    space = SPACES["wide"]
    zeros, ones = np.zeros((40, 24), dtype=space.dtype), np.ones((40, 24), dtype=space.dtype)
    child = space.cross(zeros, ones, np.random.default_rng(0))
    assert 0.4 < child.mean() < 0.6
    assert len(np.unique(child, axis=0)) == 40
