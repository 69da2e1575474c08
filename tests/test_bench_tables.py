"""Tables: looking up, refusing, and the real ones with their published figures."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from espalier.bench import tables
from espalier.bench.table import Table
from espalier.errors import DataError, EspalierError
from espalier.problem import Metric
from espalier.space import Space, choice, integer, real
from espalier.testing import check_cost, check_estimator
from espalier.testing.table import check_table

DISCRETE = Space([choice("a", "x", "y"), integer("b", 1, 3), choice("c", 0, 1, when={"a": ("y",)})])
WIDE = Space([integer(f"d{i}", 0, 99) for i in range(12)])
REAL = Space([choice("a", "x", "y"), real("lr", 0.001, 1.0, log=True)])


def made(space: Space, n: int, **changes: object) -> Table:
    rng = np.random.default_rng(0)
    codes = space.enumerate() if space.size < 100 else space.sample(n, rng)
    codes = codes[rng.permutation(len(codes))][:n]
    numbers = {name: rng.random(len(codes)) for name in ("val", "test", "cost")}
    about = [Metric("val", "%", "max", "measured", "validation"),
             Metric("test", "%", "max", "measured", "test"), Metric("cost", "ms")]  # fmt: skip
    settings = {
        "name": "made", "space": space, "codes": codes, "columns": numbers,
        "about": {m.name: m for m in about}, "validation": "val", "test": "test",
        "source": "random numbers",
    }  # fmt: skip
    return Table(**{**settings, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("space", [DISCRETE, WIDE, REAL], ids=["discrete", "wide", "real"])
def test_a_table_conforms_and_finds_each_row(space: Space) -> None:
    table = made(space, 7)
    check_table(table)
    order = np.random.default_rng(1).permutation(len(table))
    assert (table.find(table.codes[order]) == order).all()
    others = space.sample(200, np.random.default_rng(2))
    kept = {tuple(r) for r in table.codes.tolist()}
    known = np.array([tuple(r) in kept for r in others.tolist()])
    assert ((table.find(others) >= 0) == known).all()
    assert not known.all()


def test_codes_that_the_space_does_not_have_are_in_no_table() -> None:
    for space in (DISCRETE, WIDE):
        table = made(space, 7)
        wrong = np.array(table.codes[:3])
        wrong[1, 1] = 120
        wrong[2, 0] = -1
        assert table.find(wrong).tolist() == [0, -1, -1]


def test_an_absent_candidate_is_named() -> None:
    table = made(DISCRETE, 7)
    absent = next(r for r in DISCRETE.enumerate()[:, None] if table.find(r)[0] < 0)
    (candidate,) = DISCRETE.decode(absent)
    with pytest.raises(EspalierError, match=f"{candidate}.*holds 7 of the space's 9"):
        table.rows(np.concatenate([table.codes[:2], absent]))
    with pytest.raises(EspalierError, match="no row"):
        table.estimator("val").estimate([candidate])


def test_best_is_by_validation_and_regret_by_test() -> None:
    table = made(DISCRETE, 7)
    val, test = table.columns["val"], table.columns["test"]
    assert val[table.best()] == val.max()
    assert table.regret(np.arange(7)) == pytest.approx(test.max() - test)
    turned = {n: Metric(n, "", "min", "measured") for n in ("val", "test", "cost")}
    less = made(DISCRETE, 7, about=turned)
    assert val[less.best()] == val.min()
    assert less.regret(np.arange(7)) == pytest.approx(test - test.min())


def test_columns_are_an_estimator_and_a_cost_that_conform() -> None:
    table = made(DISCRETE, 9)
    candidates = DISCRETE.decode(table.codes[:4])
    check_estimator(table.estimator("val", "test"), candidates)
    check_cost(table.cost("cost"), candidates)
    assert table.estimator().metrics[0].name == "val"
    copy = pickle.loads(pickle.dumps(table))
    assert (copy.find(table.codes) == np.arange(9)).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"codes": DISCRETE.enumerate()[[0, 1, 1]]}, "each candidate has one row"),
        ({"codes": np.full((3, 3), 9, dtype=np.int16)}, "valid and canonical, row 0"),
        ({"codes": np.zeros((3, 2), dtype=np.int16)}, r"codes are \(n, 3\)"),
        ({"validation": "vall"}, "Did you mean 'val'"),
        ({"epoch_seconds": np.ones(2)}, "epoch_seconds has 2 rows, the table 7"),
        ({"about": {}}, "every column needs its Metric"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(DataError, match=words):
        made(DISCRETE, 7, **changes)


def test_unknown_columns_are_refused_with_the_nearest() -> None:
    table = made(DISCRETE, 7)
    with pytest.raises(EspalierError, match="Did you mean 'cost'"):
        table.cost("costs")
    with pytest.raises(EspalierError, match="name the columns"):
        table.cost()
    costs_only = made(DISCRETE, 7, validation="", test="")
    with pytest.raises(EspalierError, match="has no validation column"):
        costs_only.best()


# --- files -----------------------------------------------------------------------------------


def refused(name: str, *words: str) -> None:
    with pytest.raises(DataError) as error:
        tables.load(name)
    for word in words:
        assert word in str(error.value)


def test_what_is_absent_says_what_to_put_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables.forget()
    monkeypatch.delenv("ESPALIER_DATA", raising=False)
    refused("nb201", "ESPALIER_DATA", "nb201/nb201.parquet")
    monkeypatch.setenv("ESPALIER_DATA", str(tmp_path))
    refused("nb201", str(tmp_path / "nb201" / "nb201.parquet"), "no file")


def test_another_file_is_refused_and_so_are_missing_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pa = pytest.importorskip("pyarrow", reason="needs pip install 'espalier[tables]'")
    import pyarrow.parquet as parquet

    tables.forget()
    monkeypatch.setenv("ESPALIER_DATA", str(tmp_path))
    path = tmp_path / "nb201" / "nb201.parquet"
    path.parent.mkdir()
    path.write_bytes(b"not a table")
    refused("nb201", "SHA-256", "ESPALIER_UNVERIFIED=1")
    monkeypatch.setenv("ESPALIER_UNVERIFIED", "1")
    refused("nb201", "can't read", "Parquet")
    parquet.write_table(pa.table({"op_1_0": [0, 1], "lat_pixel3": [1.0, 2.0]}), path)
    refused("nb201", "lacks the columns op_2_0", "op_1_0")


def test_unknown_tables_options_and_values_are_refused() -> None:
    for name, words in (
        ("nb20", "Did you mean 'nb201'"),
        ("nb201:data=cifar10", "Did you mean 'dataset'"),
        ("nb201:dataset=cifar", "Did you mean 'cifar10'"),
        ("nb201:dataset", "dataset"),
    ):
        with pytest.raises(EspalierError, match=words):
            tables.load(name)


# --- the real ones ---------------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.parametrize(
    ("dataset", "best_test", "by_validation"),
    [("cifar10", 94.37, 94.30), ("cifar100", 73.51, 73.48)],
)
def test_nb201_is_whole_and_has_the_published_optima(
    dataset: str, best_test: float, by_validation: float, real_data: Path
) -> None:
    table = tables.load(f"nb201:dataset={dataset}")
    check_table(table)
    assert len(table) == table.space.size == 15_625
    assert table.columns["test_acc"].max() == pytest.approx(best_test, abs=0.005)
    assert table.columns["test_acc"][table.best()] == pytest.approx(by_validation, abs=0.005)
    assert table.columns["params"].max() == {"cifar10": 1_531_546, "cifar100": 1_537_396}[dataset]
    assert sum(name.startswith("lat_") for name in table.columns) == 23
    assert all((table.columns[n] > 0).all() for n in table.columns if n.startswith("lat_"))


@pytest.mark.data
def test_nb201_features_know_the_costs(real_data: Path) -> None:
    table = tables.load("nb201")
    assert table.encode is not None
    features = table.encode(table.codes)
    assert np.isfinite(features).all()
    assert np.linalg.matrix_rank(features[:2000]) > 50
    assert table is tables.load("nb201:dataset=cifar10")
