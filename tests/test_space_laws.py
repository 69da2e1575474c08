"""The laws of spaces over random ones: decisions, nested conditions, constraints, mixed options."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from espalier.errors import SpaceError
from espalier.space import (
    Decision,
    Forbid,
    Integer,
    Linear,
    Ordinal,
    Real,
    Space,
    choice,
    integer,
    ordinal,
    real,
)
from espalier.testing.space import check_space

EASY = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
options = st.one_of(
    st.integers(-5, 300),
    st.booleans(),
    st.text("abcdefg", min_size=1, max_size=3),
    st.floats(-10, 10, width=16),
)


def _distinct(values: list[object]) -> list[object]:
    return list({(isinstance(v, bool), v): v for v in values}.values())


@st.composite
def decisions(draw: st.DrawFn, name: str, parents: list[Decision], reals: bool) -> Decision:
    when = {}
    if parents and draw(st.booleans()):
        for parent in draw(st.lists(st.sampled_from(parents), min_size=1, max_size=2)):
            chosen = st.lists(st.sampled_from(list(parent.options)), min_size=1, max_size=3)
            when[parent.name] = tuple(draw(chosen))
    kind = draw(st.sampled_from("coi" + "rl" * reals))
    if kind == "c":
        return choice(name, *_distinct(draw(st.lists(options, min_size=1, max_size=4))), when=when)
    if kind == "o":
        values = draw(st.lists(st.integers(-50, 50), min_size=1, max_size=4, unique=True))
        return ordinal(name, *sorted(values), when=when)
    low = draw(st.integers(-3, 3))
    if kind == "i":
        return integer(name, low, low + draw(st.integers(0, 4)), when=when)
    width = draw(st.floats(0.01, 100))
    return real(
        name, *((1e-3, 1e-3 + width) if kind == "l" else (low, low + width)), kind == "l", when
    )


@st.composite
def spaces(draw: st.DrawFn, reals: bool = True, constrained: bool = False) -> Space:
    made: list[Decision] = []
    for i in range(draw(st.integers(1, 6))):
        parents = [d for d in made if not isinstance(d, Real)]
        made.append(draw(decisions(f"d{i}", parents, reals)))
    order = draw(st.permutations(made))
    return Space(order, draw(constraints(made)) if constrained else ())


@st.composite
def constraints(draw: st.DrawFn, made: list[Decision]) -> list[Linear | Forbid]:
    out: list[Linear | Forbid] = []
    summed = [d for d in made if isinstance(d, (Integer, Ordinal, Real))]
    listed = [d for d in made if not isinstance(d, Real)]
    if summed and draw(st.booleans()):
        terms = {d.name: draw(st.integers(-3, 3)) for d in summed[:3]}
        out.append(Linear(terms, draw(st.sampled_from(["<=", ">="])), draw(st.integers(-40, 40))))
    if listed and draw(st.booleans()):
        out.append(Forbid({d.name: draw(st.sampled_from(list(d.options))) for d in listed[:2]}))
    return out


def by_hand(space: Space) -> set[tuple[tuple[str, object], ...]]:
    """Every candidate, by trying every combination of options with the rules as they are worded."""
    out = set()
    for combination in itertools.product(*(d.options for d in space.decisions)):
        given_ = dict(zip(space.names, combination, strict=True))

        def on(name: str, given_: dict[str, object] = given_) -> bool:
            return all(
                on(p) and any(_same(given_[p], o) for o in allowed)
                for p, allowed in space[name].when.items()
            )

        kept = {n: o for n, o in given_.items() if on(n)}
        if all(_keeps(c, kept) for c in space.constraints):
            out.add(tuple((n, (isinstance(o, bool), o)) for n, o in sorted(kept.items())))
    return out


def _same(a: object, b: object) -> bool:
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _keeps(rule: object, kept: dict[str, object]) -> bool:
    if isinstance(rule, Forbid):
        return not all(n in kept and _same(kept[n], o) for n, o in rule.options.items())
    assert isinstance(rule, Linear)
    if any(n not in kept for n in rule.coefficients):
        return True
    total = sum(c * float(kept[n]) for n, c in rule.coefficients.items())  # type: ignore[arg-type]
    return total <= rule.bound if rule.op == "<=" else total >= rule.bound


@EASY
@given(spaces())
def test_laws(space: Space) -> None:
    check_space(space)


@EASY
@given(spaces(constrained=True))
def test_laws_under_constraints(space: Space) -> None:
    try:
        space.sample(4, np.random.default_rng(0))
    except SpaceError:
        assume(False)
    check_space(space)


@EASY
@given(spaces(reals=False, constrained=True))
def test_listing_agrees_with_every_combination(space: Space) -> None:
    listed = space.decode(space.enumerate())
    found = {tuple((n, (isinstance(o, bool), o)) for n, o in c.items()) for c in listed}
    assert len(found) == len(listed)
    assert found == by_hand(space)


@EASY
@given(spaces(reals=False))
def test_size_agrees_with_every_combination(space: Space) -> None:
    assert space.size == len(by_hand(space))


@EASY
@given(spaces(reals=False, constrained=True))
def test_sampling_fails_exactly_when_nothing_is_valid(space: Space) -> None:
    rng = np.random.default_rng(0)
    if by_hand(space):
        assert space.valid(space.sample(20, rng)).all()
    else:
        with pytest.raises(SpaceError, match="no candidate keeps the constraints"):
            space.sample(20, rng)


@EASY
@given(spaces(reals=False, constrained=True), st.integers(0, 2**32 - 1))
def test_neighbours_are_all_of_them(space: Space, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = space.enumerate()
    assume(len(rows))
    row = rows[rng.integers(len(rows))]
    on = space.active(row[None])[0]
    expected = set()
    for other in rows:
        both = on & space.active(other[None])[0]
        woken = space.active(other[None])[0] & ~on
        # what the change wakes is at its first option
        if (row != other)[both].sum() == 1 and not other[woken].any():
            expected.add(tuple(other.tolist()))
    # a change that puts decisions to sleep leaves one change among those active in both
    assert {tuple(r) for r in space.neighbours(row).tolist()} == expected


@EASY
@given(spaces(constrained=True), st.integers(0, 2**32 - 1))
def test_repair_mends_anything(space: Space, seed: int) -> None:
    rng = np.random.default_rng(seed)
    try:
        space.sample(1, rng)
    except SpaceError:
        assume(False)
    wild = rng.integers(-9, 99, size=(16, len(space))).astype(space.dtype)
    mended = space.repair(wild, rng)
    assert space.valid(mended).all()
    assert np.array_equal(space.canonical(mended), mended)


@EASY
@given(spaces(constrained=True))
def test_pickle_and_equality(space: Space) -> None:
    back = pickle.loads(pickle.dumps(space))
    assert back == space
    assert back.decisions == space.decisions
    assert {space: 1}[back] == 1
    assert back.size == space.size
