"""Bad input: one clear line that names the rule, the value received and what there is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from espalier.errors import SpaceError
from espalier.space import (
    Candidate,
    Forbid,
    Integer,
    Linear,
    Space,
    choice,
    integer,
    ordinal,
    real,
)

SPACE = Space(
    [
        ordinal("width", 16, 32, 64),
        choice("kernel", 3, 5),
        integer("depth", 1, 4),
        real("dropout", 0, 0.5),
        choice("pool", "max", "avg", when={"depth": (3, 4)}),
    ]
)
WHOLE = Space([integer("a", 0, 9), choice("b", "x", "y")])
RNG = np.random.default_rng(0)
FULL = {"width": 16, "kernel": 3, "depth": 1, "dropout": 0.1}

CASES: dict[str, tuple[Callable[[], object], list[str]]] = {
    "no options": (lambda: choice("kernel"), ["'kernel'", "at least one option"]),
    "an option twice": (lambda: choice("kernel", 3, 5, 3), ["must differ", "3 twice"]),
    "16 and 16.0": (lambda: ordinal("width", 16, 16.0), ["must differ", "16.0 twice"]),
    "an option that is none": (lambda: choice("pool", None), ["str, int, float or bool", "None"]),
    "NaN as an option": (lambda: choice("p", float("nan")), ["must be finite", "nan"]),
    "a name with a space": (lambda: choice("my width", 1), ["without spaces", "'my width'"]),
    "an empty name": (lambda: choice("", 1), ["a word", "''"]),
    "options as one string": (lambda: Space([_categorical("abc")]), ["a sequence", "'abc'"]),
    "low above high": (lambda: integer("depth", 4, 1), ["low must not exceed high", "4 to 1"]),
    "half a depth": (lambda: integer("depth", 1, 2.5), ["whole number", "2.5"]),
    "a depth as text": (lambda: Integer("depth", "1", 2), ["finite number", "'1'"]),
    "an empty range": (lambda: real("p", 1, 1), ["low must be below high", "1 to 1"]),
    "an infinite range": (lambda: real("p", 0, float("inf")), ["finite", "inf"]),
    "log of zero": (lambda: real("lr", 0, 1, log=True), ["above 0", "0"]),
    "when as a list": (lambda: choice("a", 1, when=["b"]), ["maps decisions", "['b']"]),
    "when with nothing": (lambda: choice("a", 1, when={"b": ()}), ["'b'", "at least one option"]),
    "two of a name": (
        lambda: Space([choice("a", 1), choice("a", 2)]),
        ["different names", "'a' twice"],
    ),
    "an unknown parent": (
        lambda: Space([integer("depth", 1, 2), choice("a", 1, when={"dept": 1})]),
        ["'a'", "unknown decision 'dept'", "'depth'"],
    ),
    "an unknown parent option": (
        lambda: Space([integer("depth", 1, 2), choice("a", 1, when={"depth": 5})]),
        ["'a'", "'depth'", "1 to 2", "5"],
    ),
    "a real parent": (
        lambda: Space([real("p", 0, 1), choice("a", 1, when={"p": 0.5})]),
        ["'a'", "'p' is real"],
    ),
    "a circle": (
        lambda: Space([choice("a", 1, when={"b": 1}), choice("b", 1, when={"a": 1})]),
        ["circle", "'a', 'b'"],
    ),
    "no list of decisions": (lambda: Space(choice("a", 1)), ["list of decisions", "Categorical"]),
    "a stranger among decisions": (lambda: Space([3]), ["list of decisions", "3"]),
    "one constraint without a list": (
        lambda: Space([choice("a", 1)], Forbid({"a": 1})),
        ["list of constraints", "Forbid"],
    ),
    "a sum of an unknown": (
        lambda: Space([integer("depth", 1, 2)], [Linear({"dept": 1}, "<=", 1)]),
        ["Linear", "unknown decision 'dept'", "Did you mean 'depth'"],
    ),
    "a sum of a categorical": (
        lambda: Space([choice("kernel", 3, 5)], [Linear({"kernel": 1}, "<=", 3)]),
        ["Linear", "'kernel' is categorical"],
    ),
    "a sum of words": (
        lambda: Space([ordinal("size", "small", "large")], [Linear({"size": 1}, "<=", 3)]),
        ["Linear", "'size' is ordinal"],
    ),
    "an op that is none": (lambda: Linear({"a": 1}, "<", 3), ["'<=' or '>='", "'<'"]),
    "a bound that is none": (lambda: Linear({"a": 1}, "<=", float("nan")), ["bound", "nan"]),
    "a sum of nothing": (lambda: Linear({}), ["coefficients", "{}"]),
    "forbidding nothing": (lambda: Forbid({}), ["options", "{}"]),
    "forbidding what is not there": (
        lambda: Space([choice("pool", "max", "avg")], [Forbid({"pool": "mean"})]),
        ["Forbid", "'mean'", "avg, max"],
    ),
    "forbidding a real": (
        lambda: Space([real("p", 0, 1)], [Forbid({"p": 0.5})]),
        ["'p' is real", "Linear"],
    ),
    "an unknown decision": (
        lambda: SPACE.candidate({**FULL, "widht": 16}),
        ["unknown decision 'widht'", "Did you mean 'width'"],
    ),
    "an unknown option": (
        lambda: SPACE.candidate({**FULL, "width": 30}),
        ["'width'", "30", "Nearest: 32", "16, 32, 64"],
    ),
    "an unknown word": (
        lambda: SPACE.candidate({**FULL, "depth": 3, "pool": "avgg"}),
        ["'pool'", "'avgg'", "Did you mean 'avg'"],
    ),
    "an option that can't be hashed": (
        lambda: SPACE.candidate({**FULL, "width": [16]}),
        ["'width'", "[16]"],
    ),
    "out of range": (lambda: SPACE.candidate({**FULL, "depth": 9}), ["'depth'", "1 to 4", "9"]),
    "true is not one": (lambda: SPACE.candidate({**FULL, "depth": True}), ["'depth'", "True"]),
    "a real out of range": (
        lambda: SPACE.candidate({**FULL, "dropout": 0.7}),
        ["'dropout'", "0 to 0.5", "0.7"],
    ),
    "a decision left out": (
        lambda: SPACE.candidate({**FULL, "depth": 4}),
        ["every active decision", "'pool'", "max, avg"],
    ),
    "a constraint broken": (
        lambda: Space([integer("a", 0, 9)], [Linear({"a": 2}, "<=", 5)]).candidate({"a": 3}),
        ["2 a <= 5", "a=3"],
    ),
    "no candidate at all": (lambda: SPACE.candidate([1, 2]), ["maps decisions", "[1, 2]"]),
    "a candidate of lists": (lambda: Candidate({"a": [1]}), ["'a'", "[1]"]),
    "an unknown name": (lambda: SPACE["kernal"], ["unknown decision 'kernal'", "'kernel'"]),
    "codes of one dimension": (lambda: SPACE.valid(np.zeros(5)), ["(n, 5)", "(5,)"]),
    "codes too narrow": (lambda: SPACE.mutate(np.zeros((2, 4)), RNG), ["(n, 5)", "(2, 4)"]),
    "codes of words": (lambda: WHOLE.decode(np.array([["1", "0"]])), ["numbers", "<U1"]),
    "half a code": (lambda: WHOLE.decode(np.array([[0.5, 0]])), ["whole numbers", "[0.5, 0.0]"]),
    "half a code beside a real": (
        lambda: SPACE.decode(np.array([[0, 0.5, 0, 0, 0]])),
        ["'kernel'", "0 to 1", "whole", "0.5 in row 0"],
    ),
    "a code beyond": (
        lambda: WHOLE.decode(np.array([[0, 0], [12, 0]])),
        ["'a'", "0 to 9", "12 in row 1"],
    ),
    "a code below": (lambda: WHOLE.mutate(np.array([[0, -1]]), RNG), ["'b'", "0 to 1", "-1"]),
    "a NaN code": (
        lambda: SPACE.mutate(np.array([[0, 0, 0, np.nan, 0]]), RNG),
        ["'dropout'", "0 to 0.5", "nan"],
    ),
    "features of a code beyond": (lambda: WHOLE.one_hot(np.array([[10, 0]])), ["'a'", "10"]),
    "distance of a code beyond": (
        lambda: WHOLE.distance(np.array([[1, 0]]), np.array([[1, 2]])),
        ["'b'", "2"],
    ),
    "a code that does not fit": (
        lambda: WHOLE.mutate(np.array([[70_000, 0]]), RNG),
        ["int16", "70000"],
    ),
    "parents of different number": (
        lambda: WHOLE.cross(WHOLE.sample(2, RNG), WHOLE.sample(3, RNG), RNG),
        ["as many rows", "2 and 3"],
    ),
    "neighbours of two rows": (lambda: WHOLE.neighbours(np.zeros((2, 2))), ["one row", "2 rows"]),
    "a rate beyond": (lambda: WHOLE.mutate(np.zeros((1, 2)), RNG, 1.5), ["0 to 1", "1.5"]),
    "a negative number of rows": (lambda: WHOLE.sample(-1, RNG), ["from 0", "-1"]),
    "a seed for a generator": (lambda: WHOLE.sample(1, 0), ["numpy Generator", "got 0"]),
    "listing a real": (lambda: SPACE.enumerate(), ["real decision", "'dropout'"]),
    "listing too many": (lambda: WHOLE.enumerate(10), ["20 candidates", "limit 10"]),
    "listing too many that are valid": (
        lambda: Space(WHOLE.decisions, [Forbid({"a": 0})]).enumerate(10),
        ["limit 10"],
    ),
    "nothing valid": (
        lambda: Space([integer("a", 0, 9)], [Linear({"a": 1}, ">=", 10)]).sample(1, RNG),
        ["no candidate keeps the constraints"],
    ),
    "hardly anything valid": (
        lambda: Space([real("p", 0, 1)], [Linear({"p": 1}, ">=", 0.9999999)]).sample(1, RNG),
        ["the constraints leave too little", "1 p >= 1", "loosen"],
    ),
    "JSON that is a list": (lambda: Space.from_json([]), ["JSON object", "[]"]),
    "JSON without decisions": (lambda: Space.from_json({}), ["'decisions'"]),
    "JSON with more": (
        lambda: Space.from_json({"decisions": [], "constraint": []}),
        ["unknown field 'constraint'", "'constraints'"],
    ),
    "JSON of an unknown kind": (
        lambda: Space.from_json({"decisions": [{"kind": "ordinl", "name": "a"}]}),
        ["unknown kind of decision 'ordinl'", "'ordinal'"],
    ),
    "JSON with a field missing": (
        lambda: Space.from_json({"decisions": [{"kind": "integer", "name": "a", "low": 1}]}),
        ["'high'"],
    ),
    "JSON options as a string": (
        lambda: Space.from_json({"decisions": [{"kind": "ordinal", "name": "a", "options": "ab"}]}),
        ["a list", "'ab'"],
    ),
    "JSON decisions as an object": (
        lambda: Space.from_json({"decisions": {"a": 1}}),
        ["'decisions'", "a list"],
    ),
    "JSON decision as a word": (lambda: Space.from_json({"decisions": ["a"]}), ["object", "'a'"]),
}


def _categorical(options: str) -> object:
    from espalier.space import Categorical

    return Categorical("a", options)


@pytest.mark.parametrize("case", CASES)
def test_bad_input_gets_one_clear_line(case: str) -> None:
    call, words = CASES[case]
    with pytest.raises(SpaceError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text


def test_codes_that_no_dtype_holds_are_not_valid() -> None:
    assert WHOLE.valid(np.array([[0, 0], [70_000, 0], [0, 2], [-1, 0]])).tolist() == [1, 0, 0, 0]
    assert WHOLE.valid(np.array([[0.5, 0], [np.nan, 0], [9, 1]])).tolist() == [0, 0, 1]


def test_what_an_inactive_column_holds_does_not_matter() -> None:
    codes = np.array([[0, 0, 0, 0.1, 99.0], [0, 0, 3, 0.1, 99.0]])
    assert SPACE.valid(codes).tolist() == [True, False]
    assert SPACE.decode(codes[:1]) == [SPACE.candidate(FULL)]
