"""Checks that any tabular benchmark must pass: `check_table(table)`."""

from __future__ import annotations

import numpy as np

from espalier.bench.drive import drive
from espalier.bench.table import Table
from espalier.errors import EspalierError
from espalier.solvers.strategies import Random

_ASKED = 200  # rows that are looked up


def check_table(table: Table) -> None:
    """Raises `AssertionError` with the rule broken.

    Every row is a valid candidate, in canonical form, once; every column is described, has a number
    a row, and validation and test point the same way; what is looked up is what stands there, in
    any order; an estimator and a cost give the same; regret is 0 for the best test row alone; a
    strategy can be driven over it.
    """
    assert table.name, "a table has a name"
    assert table.source, "a table says where it comes from"
    check_rows(table)
    check_columns(table)
    check_look_up(table)
    check_parts(table)
    check_curves(table)
    if table.validation:  # a table of costs alone has nothing to choose by
        check_regret(table)
        check_drive(table)


def check_rows(table: Table) -> None:
    """Rows are canonical, valid, each once."""
    space, codes = table.space, table.codes
    assert len(codes) > 0, "a table has rows"
    assert np.array_equal(space.canonical(codes), codes), "codes are canonical"
    assert space.valid(codes).all(), "every row is a valid candidate of the space"
    assert len(space.unique(codes)) == len(codes), "every row is there once"


def check_columns(table: Table) -> None:
    """Columns are described and whole; validation and test have one goal and unit."""
    assert set(table.columns) == set(table.about), "every column has its Metric and the reverse"
    for name, column in table.columns.items():
        assert np.shape(column) == (len(table.codes),), f"{name} has a number a row"
        assert table.about[name].name == name, f"{name} is described under its own name"
        assert not np.isinf(np.asarray(column, dtype=float)).any(), f"{name} is never infinite"
    if not table.validation and not table.test:
        return
    for role in ("validation", "test"):
        name = getattr(table, role)
        assert name in table.columns, f"{role} names a column, got {name!r}"
        assert table.about[name].how in ("measured", "estimated", "predicted"), (
            f"{name} was not counted: how is {table.about[name].how!r}"
        )
    # a training that failed has no validation; every other row can be chosen, and so reported
    failed = np.isnan(table.columns[table.validation])
    assert not failed.all(), "a table has rows that did not fail"
    assert not np.isnan(table.columns[table.test])[~failed].any(), "the test column has no gaps"
    a, b = table.about[table.validation], table.about[table.test]
    assert a.goal == b.goal, "validation and test have one goal"
    assert a.unit == b.unit, "validation and test have one unit"


def check_look_up(table: Table) -> None:
    """find, rows and metrics give what stands in the table, in any order, and refuse the rest."""
    rng = np.random.default_rng(0)
    rows = rng.integers(len(table.codes), size=_ASKED)
    codes = table.codes[rows]
    before = codes.copy()
    assert np.array_equal(table.find(codes), rows), "find gives the row of each candidate"
    assert np.array_equal(table.rows(codes), rows), "rows gives the row of each candidate"
    assert np.array_equal(codes, before), "codes given are not changed"
    assert len(table.find(codes[:0])) == 0, "no candidates have no rows"
    names = tuple(filter(None, (table.validation, table.test))) or tuple(table.columns)[:2]
    found = table.metrics(names, codes)
    for name in names:
        expected = np.asarray(table.columns[name], dtype=float)[rows]
        assert np.array_equal(found[name], expected, equal_nan=True), (
            f"metrics gives {name} as it stands"
        )
        assert found.about[name] == table.about[name], f"metrics describes {name} as the table"
    absent = table.space.sample(_ASKED, rng)
    absent = absent[table.find(absent) < 0]
    if len(absent):
        try:
            table.rows(absent)
        except EspalierError:
            pass
        else:
            raise AssertionError("rows refuses a candidate that the table lacks")


def check_parts(table: Table) -> None:
    """The table as an estimator and as a cost gives its own numbers."""
    some = table.codes[:5]
    candidates = table.space.decode(some)
    if table.validation:
        scored = table.estimator(table.validation).estimate(candidates)
        expected = np.asarray(table.columns[table.validation], dtype=float)[:5]
        same = np.array_equal(scored[table.validation], expected, equal_nan=True)
        assert same, "the estimator gives the column"
    costs = [n for n, m in table.about.items() if m.goal == "min" and not m.split]
    if costs:
        priced = table.cost(*costs[:2]).estimate_codes(some)
        for name in costs[:2]:
            column = np.asarray(table.columns[name], dtype=float)[:5]
            assert np.array_equal(priced[name], column, equal_nan=True), (
                f"the cost gives {name} as it stands"
            )
    for part, given in (("encode", table.encode), ("graphs", table.graphs)):
        if given is None:
            continue
        made = given(table.codes[:7])
        size = len(made if part == "encode" else made.operators)  # type: ignore[union-attr]
        assert size == 7, f"{part} gives a row a candidate"
    if table.encode is not None:
        whole, part_ = table.encode(table.codes[:7]), table.encode(table.codes[3:4])
        assert np.isfinite(whole).all(), "features are finite"
        assert np.allclose(whole[3], part_[0]), "features do not depend on the batch"


def check_regret(table: Table) -> None:
    """Regret is never negative, and 0 exactly for the best test result."""
    every = np.flatnonzero(~np.isnan(table.columns[table.validation]))
    lost = np.asarray(table.regret(every), dtype=float)
    sign = 1.0 if table.about[table.test].goal == "max" else -1.0
    test = sign * np.asarray(table.columns[table.test], dtype=float)
    assert (lost >= 0).all(), "regret is never negative"
    assert np.allclose(lost, np.nanmax(test) - test[every]), (
        "regret is what is lost against the best test row"
    )
    choice = np.asarray(table.columns[table.validation], dtype=float)
    rising = table.about[table.validation].goal == "max"
    best = np.nanmax(choice) if rising else np.nanmin(choice)
    assert choice[table.best()] == best, "best is the row with the best validation"


def check_curves(table: Table) -> None:
    """Learning curves have a row a candidate; training seconds are above 0."""
    for name, curve in table.curves.items():
        assert curve.ndim == 3, f"the curve of {name} is (rows, seeds, epochs), got {curve.shape}"
        assert len(curve) == len(table.codes), f"the curve of {name} has a row a candidate"
    if table.epoch_seconds is not None:
        seconds = np.asarray(table.epoch_seconds, dtype=float)
        assert seconds.shape == (len(table.codes),), "epoch_seconds has a number a row"
        assert (seconds > 0).all(), "an epoch takes more than 0 seconds"


def check_drive(table: Table) -> None:
    """Random search runs on it, where the table holds all of its space: every query is told."""
    drawn = table.space.sample(20, np.random.default_rng(1))
    if (table.find(drawn) >= 0).all():
        trace = drive(Random(table.space, 0), table, 20)
        assert len(trace) == min(20, len(table.codes)), "every query is answered"
