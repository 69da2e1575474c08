"""What the whole-array operations do, beyond the laws: distributions, rates, keys, known values."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from espalier.space import (
    Candidate,
    Forbid,
    Linear,
    Space,
    choice,
    integer,
    ordinal,
    real,
    rows,
)
from espalier.testing.space import check_space

README = [
    ordinal("width", 16, 32, 64),
    choice("kernel", 3, 5),
    integer("depth", 1, 4),
    real("dropout", 0, 0.5),
    choice("pool", "max", "avg", when={"depth": (3, 4)}),
]


def test_the_space_of_the_readme() -> None:
    space = Space(README)
    check_space(space)
    candidate = space.candidate({"width": 32, "kernel": 3, "depth": 2, "dropout": 0.25})
    assert str(candidate) == "depth=2 dropout=0.25 kernel=3 width=32"
    assert space.encode([candidate]).tolist() == [[1, 0, 1, 0.25, 0]]
    # stored by others: must not change from one version to the next
    assert space.fingerprint == "ea15badfcbe87544"
    assert candidate.id == "d66b103fe82b"


def test_fingerprints_are_the_same_in_another_process() -> None:
    code = (
        "import json, sys; from espalier.space import Space, Candidate;"
        "d = json.load(sys.stdin);"
        "print(Space.from_json(d['s']).fingerprint, Candidate.from_json(d['c']).id)"
    )
    space = Space(README)
    candidate = space.decode(space.corner(last=True))[0]
    text = json.dumps({"s": space.to_json(), "c": candidate.to_json()})
    out = subprocess.run(
        [sys.executable, "-c", code], input=text, capture_output=True, text=True, check=True
    )
    assert out.stdout.split() == [space.fingerprint, candidate.id]


def test_a_fingerprint_tells_spaces_apart() -> None:
    base = Space([ordinal("a", 1, 2), choice("b", 1, 2, when={"a": (1, 2)})])
    same = Space([ordinal("a", 1, 2), choice("b", 1, 2, when={"a": (2, 1)})])
    others = [
        Space([choice("b", 1, 2, when={"a": (1, 2)}), ordinal("a", 1, 2)]),
        Space([choice("a", 1, 2), choice("b", 1, 2, when={"a": (1, 2)})]),
        Space([ordinal("a", 1, 2), choice("b", 1, 2, when={"a": 1})]),
        Space([ordinal("a", 1, 2), choice("b", 1, 2)]),
        Space([ordinal("a", 1, 2), choice("b", True, 2, when={"a": (1, 2)})]),
        Space(base.decisions, [Forbid({"a": 1})]),
    ]
    assert same == base
    assert len({s.fingerprint for s in [base, *others]}) == len(others) + 1


def test_a_space_of_nothing_has_one_candidate() -> None:
    space = Space([])
    check_space(space)
    assert space.size == 1
    assert space.decode(space.enumerate()) == [Candidate({})]


def test_conditions_of_conditions() -> None:
    space = Space(
        [
            choice("leaf", "x", "y", when={"branch": "on", "width": (32, 64)}),
            choice("branch", "on", "off", when={"depth": 3}),
            integer("depth", 1, 3),
            ordinal("width", 16, 32, 64),
        ]
    )
    check_space(space)
    # depth 1, 2: 3 widths; depth 3: off 3, on with 16: 1, on with 32 or 64: 2 leaves each
    assert space.size == 2 * 3 + 3 + 1 + 4
    wild = np.array([[1, 0, 1, 2], [1, 0, 2, 0], [1, 0, 2, 1], [1, 1, 2, 1]])
    settled = [[0, 0, 1, 2], [0, 0, 2, 0], [1, 0, 2, 1], [0, 1, 2, 1]]
    assert space.canonical(wild).tolist() == settled


def test_size_of_a_space_far_too_large_to_list() -> None:
    stages = []
    for s in range(40):
        stages.append(integer(f"depth{s}", 1, 4))
        for b in range(4):
            allowed = tuple(range(b + 1, 5))
            stages.append(choice(f"kernel{s}.{b}", 3, 5, 7, when={f"depth{s}": allowed}))
    assert Space(stages).size == (3 + 9 + 27 + 81) ** 40


def test_sampling_gives_each_option_alike() -> None:
    space = Space(README)
    n = 40_000
    codes = space.sample(n, np.random.default_rng(0))
    for j, k in ((0, 3), (1, 2), (2, 4)):
        share = np.bincount(codes[:, j].astype(int), minlength=k) / n
        assert np.allclose(share, 1 / k, atol=0.015)
    pool = codes[codes[:, 2] >= 2, 4]
    assert abs(pool.mean() - 0.5) < 0.015
    assert np.allclose(np.quantile(codes[:, 3], [0.25, 0.5, 0.75]), [0.125, 0.25, 0.375], atol=0.01)


def test_a_log_decision_is_even_in_its_logarithm() -> None:
    space = Space([real("lr", 1e-4, 1.0, log=True)])
    codes = space.sample(20_000, np.random.default_rng(0))
    expected = [1e-3, 1e-2, 1e-1]
    found = np.quantile(codes[:, 0], [0.25, 0.5, 0.75])
    assert np.allclose(np.log10(found), np.log10(expected), atol=0.1)


def test_rejection_and_listing_draw_alike() -> None:
    decisions = [integer("a", 0, 29), integer("b", 0, 29), choice("c", 1, 2, 3, when={"a": 0})]
    # 3 of 900 pairs are left; with a = 0 there are three candidates to share its third
    rule = Linear({"a": 1, "b": 1}, "<=", 1)
    space = Space(decisions, [rule])
    codes = space.sample(30_000, np.random.default_rng(0))
    shares = {
        tuple(codes[i].tolist()): float((codes == codes[i]).all(1).mean())
        for i in space.unique(codes)
    }
    assert len(shares) == 7
    for row, share in shares.items():
        assert abs(share - (1 / 9 if row[0] == 0 else 1 / 3)) < 0.01


@pytest.mark.parametrize("rate", [0.01, 0.2, 0.6, 1.0])
def test_mutation_changes_at_the_rate(rate: float) -> None:
    space = Space([choice(f"c{i}", *range(4)) for i in range(20)])
    rng = np.random.default_rng(0)
    codes = space.sample(5000, rng)
    moved = space.mutate(codes, rng, rate)
    share = (moved != codes).mean(0)
    assert np.allclose(share, rate, atol=0.03)
    # each other option alike
    shift = (moved - codes)[moved != codes] % 4
    assert np.allclose(np.bincount(shift, minlength=4)[1:] / len(shift), 1 / 3, atol=0.04)


def test_mutation_without_a_rate_changes_every_row() -> None:
    space = Space([*README, choice("fixed", 1)])
    rng = np.random.default_rng(0)
    codes = space.sample(5000, rng)
    changed = space.mutate(codes, rng) != codes
    assert changed.any(1).all()
    assert not changed[:, 5].any()
    # 1/5 a decision, and one of them where there would be none
    assert 1.0 < changed[:, :4].sum(1).mean() < 1.5
    alone = Space([choice("fixed", 1)])
    assert alone.mutate(alone.sample(3, rng), rng).tolist() == [[0]] * 3


def test_mutation_of_a_real_decision_steps_within_its_range() -> None:
    space = Space([real("p", -1, 1)])
    rng = np.random.default_rng(0)
    moved = space.mutate(np.zeros((20_000, 1)), rng, 1.0)
    assert abs(moved.std() - 0.3) < 0.01
    edge = space.mutate(np.ones((1000, 1)), rng, 1.0)
    assert edge.max() == 1.0
    assert edge.min() >= -1.0


def test_decisions_that_wake_are_drawn() -> None:
    space = Space([choice("on", False, True), choice("c", *range(8), when={"on": True})])
    rng = np.random.default_rng(0)
    asleep = space.encode([{"on": False}] * 8000)
    woken = space.mutate(asleep, rng, 1.0)
    assert (woken[:, 0] == 1).all()
    assert np.allclose(np.bincount(woken[:, 1], minlength=8) / 8000, 1 / 8, atol=0.02)


def test_crossing_takes_from_the_parents() -> None:
    space = Space(README)
    rng = np.random.default_rng(0)
    a, b = space.sample(4000, rng), space.sample(4000, rng)
    child = space.cross(a, b, rng)
    on, on_a, on_b = space.active(child), space.active(a), space.active(b)
    from_a, from_b = (child == a) & on_a, (child == b) & on_b
    assert (from_a | from_b)[on].all()
    differ = (a != b) & on_a & on_b & on
    assert abs(from_a[differ].mean() - 0.5) < 0.03


def test_repair_changes_little() -> None:
    space = Space(
        [integer(f"i{k}", 0, 9) for k in range(20)],
        [Linear({"i0": 1, "i1": 1}, "<=", 6), Forbid({"i2": 0})],
    )
    rng = np.random.default_rng(0)
    codes = Space(space.decisions).sample(4000, rng)
    broken = ~space.valid(codes)
    assert broken.mean() > 0.3
    mended = space.repair(codes, rng)
    assert space.valid(mended).all()
    changes = (mended != codes).sum(1)
    assert (changes[~broken] == 0).all()
    assert changes[broken].mean() < 1.6
    assert changes.max() <= 3


def test_repair_may_put_a_decision_to_sleep() -> None:
    # the sum can only be kept by switching its decision off
    decisions = [choice("on", True, False), integer("a", 5, 9, when={"on": True})]
    space = Space(decisions, [Linear({"a": 1}, "<=", 1)])
    rng = np.random.default_rng(0)
    mended = space.repair(np.array([[0, 3]] * 50), rng)
    assert mended.tolist() == [[1, 0]] * 50


def test_keys_of_rows_that_need_several_words() -> None:
    wide = Space([choice(f"c{i}", *range(50)) for i in range(30)])
    rng = np.random.default_rng(0)
    codes = wide.sample(3000, rng)
    codes = np.concatenate([codes, wide.mutate(codes, rng, 0.02), codes[::-1]])
    keys = wide.keys(codes)
    assert keys.dtype.kind == "S"
    _, expected = np.unique(codes, axis=0, return_index=True)
    assert wide.unique(codes).tolist() == sorted(expected.tolist())
    assert len(set(keys.tolist())) == len(expected)
    assert len(np.unique(keys)) == len(expected)
    small = Space([choice(f"c{i}", *range(50)) for i in range(11)])
    assert small.keys(small.sample(2, rng)).dtype == np.uint64


def test_keys_survive_trailing_zeros_and_negative_zero() -> None:
    space = Space([real("a", -1, 1), real("b", -1, 1)])
    codes = np.array([[0.0, 0.0], [-0.0, 0.0], [0.0, 5e-324], [5e-324, 0.0]])
    keys = space.keys(codes).tolist()
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3
    assert space.unique(codes).tolist() == [0, 2, 3]
    assert not np.signbit(space.canonical(codes)).any()


def test_unique_when_labels_collide(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = Space([choice(f"c{i}", *range(50)) for i in range(30)])
    rng = np.random.default_rng(0)
    codes = wide.sample(300, rng)
    codes = np.concatenate([codes, codes])[rng.permutation(600)]
    expected = wide.unique(codes).tolist()
    monkeypatch.setattr(rows, "_mixed", lambda words: words[0] % np.uint64(3))
    assert wide.unique(codes).tolist() == expected
    assert len(expected) == 300


def test_a_wide_integer_is_a_scale() -> None:
    space = Space([integer("channels", 1, 5_000_000_000), choice("kernel", 3, 5)])
    check_space(space)
    assert space.dtype == np.int64
    assert space.one_hot_names == ("channels", "kernel=3", "kernel=5")
    near = space.decode(space.neighbours(space.encode([{"channels": 100, "kernel": 3}])))
    found = {c["channels"] for c in near if c["kernel"] == 3}
    assert found == {1, 99, 101, 500_000_100, 5_000_000_000}


def test_one_hot_and_distance_by_hand() -> None:
    space = Space(README)
    a = space.encode([{"width": 16, "kernel": 3, "depth": 1, "dropout": 0.5}])
    options = {"width": 64, "kernel": 3, "depth": 4, "dropout": 0.25, "pool": "avg"}
    b = space.encode([options])
    named = dict(zip(space.one_hot_names, space.one_hot(a)[0].tolist(), strict=True))
    assert {n for n, v in named.items() if v} == {"width=16", "kernel=3", "depth=1", "dropout"}
    assert space.distance(a, b)[0, 0] == pytest.approx((1 + 0 + 1 + 0.5 + 1) / 5)
    # a conditional real needs a column that tells 0 from inactive
    gated = Space([choice("on", 0, 1), real("p", 0, 1, when={"on": 1})])
    assert gated.one_hot_names == ("on=0", "on=1", "p", "p:active")
    codes = gated.encode([{"on": 0}, {"on": 1, "p": 0.0}, {"on": 1, "p": 0.5}])
    assert gated.one_hot(codes).tolist() == [[1, 0, 0, 0], [0, 1, 0, 1], [0, 1, 0.5, 1]]


def test_corners() -> None:
    space = Space(README)
    first, last = space.decode(np.concatenate([space.corner(False), space.corner(True)]))
    assert first.to_json() == {"width": 16, "kernel": 3, "depth": 1, "dropout": 0.0}
    assert last["pool"] == "avg"
    assert last["dropout"] == 0.5


def test_listing_prunes_by_constraints() -> None:
    # 10^12 combinations, of which 13 keep the sum: the prefixes must be cut on the way
    rules = [Linear({f"i{k}": 1, f"i{k + 1}": 1}, "<=", 1) for k in range(11)]
    space = Space([integer(f"i{k}", 0, 9) for k in range(12)], rules)
    listed = space.enumerate(1000)
    assert len(listed) == 377  # Fibonacci: no two ones side by side in 12 places
    assert space.valid(listed).all()


def test_candidates_are_values() -> None:
    a, b = Candidate({"b": 1, "a": "x"}), Candidate({"a": "x", "b": 1.0})
    assert (a, hash(a), a.id) == (b, hash(b), b.id)
    assert Candidate({"a": True}) != Candidate({"a": 1})
    assert list(a) == ["a", "b"]
    assert str(a) == "a=x b=1"
    assert Candidate({"n": np.int64(3)}).to_json() == {"n": 3}
    assert a == {"a": "x", "b": 1}
    assert len({a, b}) == 1


@pytest.mark.parametrize(
    ("method", "law"),
    [
        ("mutate", "mutate.*valid rows"),
        ("canonical", "canonical"),
        ("unique", "first of each kind"),
        ("encode", "encode"),
        ("neighbours", "neighbour"),
        ("one_hot", "one_hot"),
    ],
)
def test_the_suite_sees_a_broken_space(
    method: str, law: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = getattr(Space, method)
    broken = {
        "mutate": lambda self, codes, rng, rate=None: whole(self, codes, rng, rate) + 9,
        "canonical": lambda self, codes: whole(self, codes)[::-1],
        "unique": lambda self, codes: whole(self, codes)[1:],
        "encode": lambda self, candidates: whole(self, candidates)[::-1],
        "neighbours": lambda self, row: whole(self, row)[[0, 0]],
        "one_hot": lambda self, codes: whole(self, codes) * 2,
    }
    monkeypatch.setattr(Space, method, broken[method])
    with pytest.raises(AssertionError, match=law):
        check_space(Space(README))


def test_a_space_needs_numpy_alone() -> None:
    code = "import sys, espalier.space; print([m for m in ('torch', 'onnx', 'scipy') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
