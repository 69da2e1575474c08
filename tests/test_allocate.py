"""Allocation: the program beside enumeration and another solver, its limits, costs as factors."""

from __future__ import annotations

import importlib
import json
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
import pytest
from torch import nn

from espalier.costs import Counts
from espalier.errors import BudgetError, EspalierError, SpaceError
from espalier.nets import Family
from espalier.problem import Limit
from espalier.solvers.allocate import (
    Factor,
    Profile,
    Program,
    cost_factors,
    pricing,
    profile,
    totals,
)
from espalier.space import Forbid, Linear, Space, choice, ordinal, real

pytest.importorskip("ortools")


def spaces(rng: np.random.Generator) -> Space:
    """Six decisions, two of them conditional, two constraints."""
    made = []
    for i in range(6):
        when = {made[i - 1].name: tuple(made[i - 1].options[:2])} if i in (3, 5) else {}
        made.append(ordinal(f"d{i}", *range(1, int(rng.integers(2, 5)) + 1), when=when))
    rules = [Linear({"d0": 1.0, "d1": 2.0}, "<=", 6.0), Forbid({"d2": 1, "d4": 1})]
    return Space(made, rules)


def tables(
    space: Space, rng: np.random.Generator, *scopes: str, scale: float = 1.0
) -> list[Factor]:
    out = []
    for scope in scopes:
        names = tuple(scope.split())
        shape = tuple(space[n].count for n in names)
        out.append(Factor(names, scale * rng.lognormal(size=shape)))
    return out


@pytest.mark.parametrize("seed", range(12))
def test_the_program_reaches_what_enumeration_finds_at_any_magnitude(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scale = (1.0, 1e-8, 1e8)[seed % 3]
    space = spaces(rng)
    harm = tables(space, rng, *space.names, "d4 d1", "d1 d3 d5", scale=scale)
    harm.append(Factor((), np.array(3.0 * scale)))
    costs = {
        "a": tables(space, rng, "d0", "d3 d2", "d5"),
        "b": tables(space, rng, "d1 d4", "d2"),
        "least": tables(space, rng, *space.names),
        "peak": [
            Factor(f.decisions, f.values, peak=True) for f in tables(space, rng, "d1 d0", "d5")
        ],
    }
    codes = space.enumerate()
    harms = totals(space, harm, codes)
    found = {k: totals(space, f, codes) for k, f in costs.items()}
    shares = {"a": 0.5, "b": 0.5, "peak": 0.7}
    limits = [Limit(k, float(np.quantile(found[k], q))) for k, q in shares.items()]
    limits.append(Limit("least", float(np.quantile(found["least"], 0.2)), ">="))
    kept = np.all([m.violation(found[m.metric]) <= 1e-12 for m in limits], axis=0)
    program = Program(space, harm, costs, limits)
    if not kept.any():
        with pytest.raises(BudgetError, match="can't be kept"):
            program.solve()
        return
    best = harms[kept].min()
    solution = program.solve()
    assert solution.optimal
    assert solution.harm == pytest.approx(best, rel=1e-9)
    assert best * (1 - 1e-8) <= solution.bound <= best * (1 + 1e-12)
    row = space.encode([solution.candidate])
    assert space.valid(row)[0]
    assert {k: totals(space, f, row)[0] for k, f in costs.items()} == pytest.approx(solution.costs)
    # the next best one, when the best is refused
    if (rest := kept & (harms > best * (1 + 1e-9))).any():
        second = program.solve(forbidden=[solution.candidate], hint=solution.candidate)
        assert second.harm == pytest.approx(harms[rest].min(), rel=1e-9)


def test_it_agrees_with_another_solver_and_greedy_is_no_better() -> None:
    from scipy.optimize import LinearConstraint, milp

    rng = np.random.default_rng(0)
    layers, options = 25, 6
    share = np.linspace(1 / options, 1, options)
    space = Space([ordinal(f"l{i}", *range(options)) for i in range(layers)])
    harm = 1e-8 * rng.lognormal(0, 2, (layers, 1)) * (1 - share) ** rng.uniform(1, 3, (layers, 1))
    cost = rng.lognormal(size=(2, layers, 1)) * share ** rng.uniform(0.5, 2, (2, layers, 1))
    bounds = cost[:, :, -1].sum(axis=1) * np.array([0.6, 0.5])

    def alone(table: np.ndarray) -> list[Factor]:
        return [Factor((name,), row) for name, row in zip(space.names, table, strict=True)]

    costs = {"a": alone(cost[0]), "b": alone(cost[1])}
    limits = [Limit("a", bounds[0]), Limit("b", bounds[1])]
    program = Program(space, alone(harm), costs, limits)
    found, greedy = program.solve(), program.greedy()
    one = np.kron(np.eye(layers), np.ones(options))
    other = milp(
        harm.ravel() / harm.max(),
        integrality=np.ones(harm.size),
        bounds=(0, 1),
        constraints=[
            LinearConstraint(one, 1, 1),
            LinearConstraint(cost.reshape(2, -1), -np.inf, bounds),
        ],
        options={"mip_rel_gap": 0.0},
    )
    assert found.optimal
    assert found.harm == pytest.approx(other.fun * harm.max(), rel=1e-6)
    assert found.harm < greedy.harm < 2 * found.harm
    for solution in (found, greedy):
        assert all(solution.costs[m.metric] <= m.bound for m in limits)


def test_small_harms_beside_large_ones_are_told_apart() -> None:
    space = Space([ordinal("coarse", 0, 1), *(ordinal(f"fine{i}", 0, 1, 2) for i in range(3))])
    harm = [Factor(("coarse",), np.array([1e8, 0.0]))]
    harm += [Factor((f"fine{i}",), np.array([3e-8 + i * 1e-9, 1e-8, 0.0])) for i in range(3)]
    cost = [Factor((f"fine{i}",), np.array([0.0, 2.0, 3.0])) for i in range(3)]
    solution = Program(space, harm, {"c": cost}, [Limit("c", 5.0)]).solve()
    best = min(
        (totals(space, harm, row[None])[0], row.tolist())
        for row in space.enumerate()
        if totals(space, cost, row[None])[0] <= 5
    )
    assert solution.harm == best[0]
    assert solution.optimal


def test_a_limit_far_beyond_every_sum_is_no_limit() -> None:
    space = Space([ordinal("a", 1, 2), ordinal("b", 1, 2)])
    harm = [Factor(("a",), np.array([1.0, 0.0])), Factor(("b",), np.array([1.0, 0.0]))]
    costs = {"ms": [Factor((n,), np.array([0.001, 0.002])) for n in ("a", "b")]}
    for bound in (1e3, 1e12, 1e300):
        found = Program(space, harm, costs, [Limit("ms", bound)]).solve()
        assert dict(found.candidate) == {"a": 2, "b": 2}


def test_what_can_not_be_kept_is_said_with_what_is_reachable() -> None:
    space = Space([ordinal("a", 1, 2), ordinal("b", 1, 2)])
    harm = [Factor(("a",), np.array([1.0, 0.0])), Factor(("b",), np.array([1.0, 0.0]))]
    cost = [Factor((), np.array(0.5)), Factor(("a", "b"), np.array([[1.0, 2.0], [2.0, 4.0]]))]
    other = [Factor(("a",), np.array([9.0, 1.0]))]
    costs = {"latency_ms": cost, "bytes": other}
    with pytest.raises(BudgetError, match=r"latency_ms <= 1 can't be kept: .* reachable is 1\.5"):
        Program(space, harm, costs, [Limit("latency_ms", 1.0), Limit("bytes", 20.0)]).solve()
    with pytest.raises(
        BudgetError, match=r"together: .*latency_ms .*kept is 2\.5; .*bytes .* is 9"
    ):
        Program(space, harm, costs, [Limit("latency_ms", 1.6), Limit("bytes", 2.0)]).solve()
    with pytest.raises(BudgetError, match="greedy"):
        Program(space, harm, costs, [Limit("latency_ms", 1.0)]).greedy()
    allowed = Program(space, harm, costs, [Limit("latency_ms", 2.5)]).solve()
    assert allowed.costs["latency_ms"] == 2.5  # exactly at the limit


def test_what_does_not_fit_is_refused_in_one_line() -> None:
    space = Space([choice("a", "x", "y"), ordinal("b", 1, 2, 3)])
    fine = [Factor(("a",), np.zeros(2))]
    with pytest.raises(SpaceError, match="Did you mean 'b'"):
        Program(space, [Factor(("bb",), np.zeros(3))], {})
    with pytest.raises(SpaceError, match=r"shape \(2, 3\)"):
        Program(space, [Factor(("a", "b"), np.zeros((3, 2)))], {})
    with pytest.raises(SpaceError, match="NaN"):
        Factor(("a",), np.array([0.0, math.nan]))
    with pytest.raises(BudgetError, match="unknown cost"):
        Program(space, fine, {"params": fine}, [Limit("param", 1.0)])
    with pytest.raises(BudgetError, match="resolve it"):
        Program(space, fine, {"params": fine}, [Limit("params", 0.5, relative=True)])
    with pytest.raises(EspalierError, match="'lr' is real: use search"):
        Program(Space([real("lr", 0, 1)]), [], {})


def test_forbidden_combinations_and_the_way_through_json() -> None:
    space = Space([ordinal("a", 1, 2, 3), ordinal("b", 1, 2)])
    values = np.array([[math.inf, 2.0], [math.inf, math.inf], [5.0, 3.0]])
    factor = Factor(("a", "b"), values, name="layer")
    again = Factor.from_json(json.loads(json.dumps(factor.to_json())))
    assert (again.values == values).all()
    assert (again.decisions, again.name, again.peak) == (("a", "b"), "layer", False)
    solution = Program(space, [again], {}).solve()
    assert (dict(solution.candidate), solution.harm) == ({"a": 1, "b": 2}, 2.0)
    worse = Program(space, [factor], {}).solve(forbidden=[solution.candidate])
    assert dict(worse.candidate) == {"a": 3, "b": 2}


@dataclass(frozen=True)
class Unit:
    name: str
    decisions: tuple[str, ...]


class Chain(Family):
    """Two convolutions and a classifier; the second one runs where `deep` is 1."""

    shape, classes = (1, 6, 6), 3
    space = Space(  # type: ignore[assignment]
        [
            ordinal("width", 4, 8),
            ordinal("deep", 0, 1),
            choice("kernel", 1, 3, when={"deep": 1}),
            ordinal("features", 4, 8, 12),
        ]
    )

    def units(self) -> list[Unit]:
        return [
            Unit("first", ("width",)),
            Unit("second", ("width", "kernel")),
            Unit("last", ("width", "features")),
        ]

    def unit(self, name: str, candidate: object) -> tuple[nn.Module, tuple[int, ...]] | None:
        width = int(candidate["width"])  # type: ignore[index]
        if name == "first":
            return nn.Conv2d(1, width, 3, padding=1), (1, 6, 6)
        if name == "second":
            if candidate["deep"] == 0:  # type: ignore[index]
                return None
            kernel = int(candidate["kernel"])  # type: ignore[index]
            return nn.Conv2d(width, width, kernel, padding=kernel // 2), (width, 6, 6)
        features = int(candidate["features"])  # type: ignore[index]
        head = nn.Sequential(nn.Flatten(), nn.Linear(36 * width, features), nn.Linear(features, 3))
        return head, (width, 6, 6)

    def build(self, candidate: object) -> nn.Module:
        found = [self.unit(u.name, candidate) for u in self.units()]
        return nn.Sequential(*(u[0] for u in found if u is not None))


def test_costs_of_a_family_as_factors_are_what_networks_count() -> None:
    family = Chain()
    rows = family.space.enumerate()
    networks = [family.build(c) for c in family.space.decode(rows)]
    for metric in ("params", "macs", "bytes", "activation_bytes"):
        factors = cost_factors(family, metric)
        assert {f.name for f in factors} == {"first", "second", "last"}
        counted = Counts(family).estimate_codes(rows)[metric]
        assert (totals(family.space, factors, rows) == counted).all()
        if metric == "params":
            assert counted.tolist() == [sum(p.numel() for p in n.parameters()) for n in networks]
    with pytest.raises(EspalierError, match="unknown metric"):
        cost_factors(family, "latency_ms")


def test_units_that_many_decisions_decide_are_sums_over_pairs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    family = Chain()
    rows = family.space.enumerate()
    (whole,) = (f for f in cost_factors(family, "params") if f.name == "last")
    monkeypatch.setattr(pricing, "_MOST", 3)
    pairs = [f for f in cost_factors(family, "params") if f.name == "last"]
    assert sorted(len(f.decisions) for f in pairs) == [0, 1, 1, 2]
    assert totals(family.space, pairs, rows) == pytest.approx(totals(family.space, [whole], rows))
    with pytest.raises(EspalierError, match="peak"):
        cost_factors(family, "activation_bytes")


def test_what_is_left_out_costs_nothing_in_sums_over_pairs_either(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    family = Chain()
    rows = family.space.enumerate()
    counted = Counts(family).estimate_codes(rows)["params"]
    monkeypatch.setattr(pricing, "_MOST", 3)
    assert (totals(family.space, cost_factors(family, "params"), rows) == counted).all()


class Told:
    """A family of a space only, whose harm is a sum with one interaction."""

    space = Space(
        [
            ordinal("a", 1, 2, 3),
            ordinal("block", 0, 1),
            ordinal("b", 1, 2, when={"block": 1}),
            choice("c", "x", "y", "z"),
        ]
    )
    alone = (
        Factor(("a",), np.array([4.0, 1.0, 0.0])),
        Factor(("block", "b"), np.array([[3.0, 3.0], [0.5, 0.0]])),
        Factor(("c",), np.array([2.0, -1.0, 0.0])),
        Factor((), np.array(7.0)),
    )
    both = Factor(("a", "c"), np.array([[0.25, 0.5, 0.0], [0.125, 1.0, 0.0], [0.0, 0.0, 0.0]]))

    def __init__(self, together: bool = False) -> None:
        self.terms = (*self.alone, self.both) if together else self.alone
        self.asked: list[int] = []

    def harm(self, candidates: object) -> np.ndarray:
        codes = self.space.encode(candidates)  # type: ignore[arg-type]
        self.asked.append(len(codes))
        return totals(self.space, self.terms, codes)


def test_a_profile_adds_up_to_harm_and_is_measured_once() -> None:
    family = Told(together=True)
    held: dict[str, object] = {}
    told: list[tuple[int, int, str]] = []

    def record(key: str, compute: object) -> object:
        if key not in held:
            held[key] = json.loads(json.dumps(compute()))  # type: ignore[operator]
        return held[key]

    settings = {"pairs": [("c", "a")], "record": record, "measure": "told", "samples": 3}
    found = profile(family, family.harm, progress=lambda *a: told.append(a), **settings)  # type: ignore[arg-type]
    rows = family.space.enumerate()
    added = totals(family.space, found.factors, rows)
    assert added == pytest.approx(totals(family.space, family.terms, rows) - 7.0)
    assert (found.base, found.measure, found.samples) == (7.0, "told", 3)
    assert told[-1][0] == told[-1][1] == sum(family.asked)
    measured = len(family.asked)
    again = profile(family, family.harm, **settings)  # type: ignore[arg-type]
    assert len(family.asked) == measured
    assert again.to_json() == found.to_json()
    read = Profile.from_json(json.loads(json.dumps(found.to_json())))
    assert read.to_json() == found.to_json()


def test_a_hurried_profile_measures_the_furthest_first_and_draws_what_lies_between() -> None:
    class Long(Told):
        """Harm of `a` is the square of the way; `c` has no order."""

        space = Space(
            [ordinal("a", 2, 4, 5, 7, 10), choice("c", "x", "y", "z"), ordinal("b", 1, 2, 3, 4)]
        )
        alone = (
            Factor(("a",), np.array([64.0, 36.0, 25.0, 9.0, 0.0])),
            Factor(("c",), np.array([2.0, -1.0, 0.0])),
            Factor(("b",), np.array([3.0, 2.5, 0.25, 0.0])),
        )

    whole = profile(Long(), Long().harm)
    family, asked, steps = Long(), list[str](), list[tuple[int, int]]()

    def hurried(name: str) -> bool:
        asked.append(name)
        return name == "a"

    found = profile(
        family, family.harm, hurried=hurried, progress=lambda d, n, _: steps.append((d, n))
    )
    assert family.asked == [
        1,
        1,
        1,
        2,
        2,
    ]  # the original, two furthest, `c`, what is between of `b`
    assert asked == ["a", "b"]
    assert found.drawn == ("a",)
    for ours, theirs in zip(found.factors, whole.factors, strict=True):
        assert ours.values == pytest.approx(theirs.values)
    assert steps[-1][0] == steps[-1][1]
    assert Profile.from_json(json.loads(json.dumps(found.to_json()))).drawn == ("a",)


def test_what_there_is_no_time_to_measure_is_guessed_by_what_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Wide(Told):
        """Harm is three times the guess, and in one case ten times."""

        space = Space([ordinal(name, 1, 3, 5) for name in "abcde"] + [choice("f", "x", "y")])
        guess: ClassVar = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0, "f": 9.0}
        alone = tuple(
            Factor((n,), np.array([factor * told, 0.0, 0.0]))
            for n, told, factor in zip("abcde", (1, 2, 3, 4, 5), (3, 10, 3, 3, 3), strict=True)
        )

    module = importlib.import_module("espalier.solvers.allocate.profile")
    monkeypatch.setattr(module, "_LEAST", 3)
    family, asked = Wide(), list[str]()

    def late(name: str) -> bool:
        asked.append(name)
        return True

    def never(name: str) -> bool:
        return False

    found = profile(family, family.harm, hurried=never, late=late, guess=Wide.guess)
    first = [name for name in "abcde" if name not in found.guessed]
    assert found.guessed == tuple(sorted(asked))
    assert len(first) in (3, 4)  # `e` has no guess
    assert "e" in first
    for factor in found.factors:
        name = factor.name
        if name in found.guessed:
            # half of the way is a quarter of the harm
            full = 3 * Wide.guess[name]
            assert factor.values == pytest.approx([full, full / 4, 0.0])
        elif name != "f":
            assert factor.values[0] == Wide.alone["abcde".index(name)].values[0]
    assert Profile.from_json(json.loads(json.dumps(found.to_json()))).guessed == found.guessed
    every = profile(family, family.harm, hurried=never, late=never, guess=Wide.guess)
    assert every.guessed == ()
    assert every.factors[1].values == pytest.approx(Wide.alone[1].values)


def test_noise_of_a_profile_is_smoothed_along_ordered_options_only() -> None:
    family = Told()
    rough = Profile(
        (
            Factor(("a",), np.array([1.0, 2.0, 0.0]), name="a"),
            Factor(("c",), np.array([2.0, -1.0, 0.0]), name="c"),
        )
    )
    a, c = rough.smoothed(family.space).factors
    assert a.values.tolist() == [1.5, 1.5, 0.0]
    assert c.values.tolist() == [2.0, -1.0, 0.0]
    negative = Profile((Factor(("a",), np.array([-1.0, -2.0, 0.0]), name="a"),))
    assert negative.smoothed(family.space).factors[0].values.tolist() == [0.0, 0.0, 0.0]


def test_limits_on_peaks_are_kept_and_told() -> None:
    space = Space([ordinal("a", 1, 2, 3), ordinal("b", 1, 2, 3)], [Forbid({"a": 1})])
    harm = [Factor((n,), np.array([2.0, 1.0, 0.0])) for n in "ab"]
    of_each = [Factor((n,), np.array([1.0, 5.0, 9.0]), peak=True) for n in "ab"]
    peaks = [Factor((), np.array(1.0), peak=True, name="input"), *of_each]
    other = [Factor(("b",), np.array([3.0, 2.0, 1.0]))]
    costs = {"memory": peaks, "other": other}
    found = Program(space, harm, costs, [Limit("memory", 6.0)]).solve()
    assert (dict(found.candidate), found.costs["memory"]) == ({"a": 2, "b": 2}, 5.0)
    with pytest.raises(BudgetError, match="least memory that is reachable is 5"):
        Program(space, harm, costs, [Limit("memory", 2.0)]).solve()
    limits = [Limit("memory", 6.0), Limit("other", 1.0)]
    with pytest.raises(BudgetError, match=r"together: .*memory .*kept is 9; .*other .* is 2"):
        Program(space, harm, costs, limits).solve()
    wide = [*peaks[:2], Factor(("b",), np.array([7.0, 7.0, 7.0]), peak=True)]
    with pytest.raises(BudgetError, match="least memory that is reachable is 7"):
        Program(space, harm, {"memory": wide}, [Limit("memory", 6.0)]).solve()


def test_what_costs_without_end_is_forbidden_by_any_limit_on_it() -> None:
    space = Space([ordinal("a", 1, 2, 3)])
    harm = [Factor(("a",), np.array([2.0, 1.0, 0.0]))]
    costs = {"speed": [Factor(("a",), np.array([1.0, 2.0, math.inf]))]}
    for op, bound in ((">=", 1.0), ("<=", 5.0)):
        program = Program(space, harm, costs, [Limit("speed", bound, op)])
        assert program.greedy().candidate["a"] == program.solve().candidate["a"] == 2
        whole = space.encode([space.candidate({"a": 3})])
        assert not program.kept(whole)
        assert program.judge(whole)[1][0] == math.inf


class Bound(Chain):
    """The chain, where the width and the features go together, and both with a third decision."""

    space = Space(  # type: ignore[assignment]
        [*Chain.space.decisions, ordinal("more", 0, 1, 2)],
        [
            Linear({"width": 1.0, "features": -1.0}, "<=", 0.0),
            Linear({"width": -1.0, "features": 1.0}, "<=", 0.0),
            Linear({"more": 4.0, "width": 1.0}, "<=", 12.0),
        ],
    )


def test_pieces_are_priced_by_rows_that_the_constraints_allow() -> None:
    family = Bound()
    rows = family.space.enumerate()
    counted = Counts(family).estimate_codes(rows)["params"]
    assert (totals(family.space, cost_factors(family, "params"), rows) == counted).all()


class Falling(Family):
    """Layers that never get wider towards the end: few rows are allowed where two widths differ."""

    shape, classes = (1, 2, 2), 3
    names = tuple(f"w{i}" for i in range(5))
    space = Space(  # type: ignore[assignment]
        [ordinal(n, 1, 2, 3, 4) for n in names],
        [Linear({a: 1.0, b: -1.0}, ">=", 0.0) for a, b in pairwise(names)],
    )

    def units(self) -> list[Unit]:
        between = [Unit(a + b, (a, b)) for a, b in pairwise(self.names)]
        return [Unit("first", ("w0",)), *between]

    def unit(self, name: str, candidate: object) -> tuple[nn.Module, tuple[int, ...]]:
        if name == "first":
            return nn.Conv2d(1, candidate["w0"], 1), (1, 2, 2)  # type: ignore[index]
        a, b = candidate[name[:2]], candidate[name[2:]]  # type: ignore[index]
        assert a >= b
        return nn.Conv2d(a, b, 1), (a, 2, 2)

    def build(self, candidate: object) -> nn.Module:
        return nn.Sequential(*(self.unit(u.name, candidate)[0] for u in self.units()))


def test_pieces_are_priced_where_hardly_any_row_is_allowed() -> None:
    family = Falling()
    rows = family.space.enumerate()
    counted = Counts(family).estimate_codes(rows)["params"]
    assert (totals(family.space, cost_factors(family, "params"), rows) == counted).all()


def test_pairs_are_told_once_and_only_of_what_can_change() -> None:
    class Fixed(Told):
        space = Space([*Told.space.decisions, ordinal("only", 1)])

    family = Fixed(together=True)
    pairs = [("a", "c"), ("c", "a"), ("only", "a")]
    found = profile(family, family.harm, pairs=pairs)
    rows = family.space.enumerate()
    added = totals(family.space, found.factors, rows)
    assert added == pytest.approx(totals(family.space, family.terms, rows) - 7.0)
