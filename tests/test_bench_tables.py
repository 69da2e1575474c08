"""Tables: looking up, refusing, and the real ones with their published figures."""

from __future__ import annotations

import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from espalier.bench import tables
from espalier.bench.surrogate import Surrogate, fit
from espalier.bench.table import Table
from espalier.bench.tables import hw_gpt_space, nb_graph_trees
from espalier.errors import DataError, EspalierError, MissingExtra
from espalier.problem import Limit, Metric, Problem
from espalier.solvers.strategies import Random
from espalier.space import Space, choice, integer, real
from espalier.study import Serial, Study
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


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("nb201", "nb201/nb201.parquet"),
        ("nb_macro", "nasbench_macro/nasbench_macro_cifar10.parquet"),
        ("nb_graph:graph=cs", "nasbench_graph/nasbench_graph_light.parquet"),
        ("hw_gpt:scale=m", "hw_gpt_bench/hwgpt_m.parquet"),
        ("fbnet_latency", "help_latency/fbnet_latency.parquet"),
        ("ofa_latency", "help_latency/ofa_latency.parquet"),
    ],
)
def test_what_is_absent_or_another_file_says_what_to_put_where(
    name: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyarrow", reason="needs pip install 'espalier[tables]'")
    tables.forget()
    monkeypatch.delenv("ESPALIER_DATA", raising=False)
    refused(name, "set ESPALIER_DATA", place, "published" if name == "nb201" else "https://")
    monkeypatch.setenv("ESPALIER_DATA", str(tmp_path))
    refused(name, "no file", str(tmp_path / place), "ESPALIER_DATA must hold")
    (tmp_path / place).parent.mkdir()
    (tmp_path / place).write_bytes(b"not a table")
    refused(name, str(tmp_path / place), "SHA-256", "ESPALIER_UNVERIFIED=1")


def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables.forget()
    monkeypatch.setenv("ESPALIER_DATA", str(tmp_path))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtra, match=r"pip install 'espalier\[tables\]'") as caught:
        tables.load("nb201")
    copy = pickle.loads(pickle.dumps(caught.value))  # as from a worker process
    assert str(copy) == str(caught.value)


def test_a_file_of_ones_own_needs_the_columns_and_their_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pa = pytest.importorskip("pyarrow", reason="needs pip install 'espalier[tables]'")
    import pyarrow.parquet as parquet

    tables.forget()
    monkeypatch.setenv("ESPALIER_DATA", str(tmp_path))
    monkeypatch.setenv("ESPALIER_UNVERIFIED", "1")
    path = tmp_path / "nb201" / "nb201.parquet"
    path.parent.mkdir()
    path.write_bytes(b"not a table")
    refused("nb201", "can't read", "Parquet")

    names = ("val_acc_cifar10", "test_acc_cifar10", "params_cifar10", "mflops_cifar10",
             "zen_cifar10", "lat_mine")  # fmt: skip
    columns = {f"op_{a}_{b}": [0, 1, 4] for a, b in ((1, 0), (2, 0), (2, 1), (3, 0), (3, 1))}
    columns |= {name: [1.0, 2.0, 3.0] for name in names}
    parquet.write_table(pa.table(columns), path)
    refused("nb201", "lacks the columns op_3_2", "op_1_0")
    parquet.write_table(pa.table({**columns, "op_3_2": [0, 5, 1]}), path)
    refused("nb201", "valid and canonical, row 1")
    parquet.write_table(pa.table({**columns, "op_3_2": [0, 3, 1]}), path)
    try:
        table = tables.load("nb201")
        assert table.cost("lat_mine").estimate_codes(table.codes)["lat_mine"].tolist() == [1, 2, 3]
    finally:
        tables.forget()


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


@pytest.mark.data
def test_latencies_of_a_table_limit_a_study(real_data: Path, tmp_path: Path) -> None:
    table = tables.load("nb201:dataset=cifar100")
    cost = table.cost("lat_pixel3")
    bound = float(np.median(table.columns["lat_pixel3"]))
    problem = Problem(table.estimator().metrics, (Limit("lat_pixel3", bound),))
    estimator = table.estimator()
    with Study.create(tmp_path / "study", {"space": table.space.fingerprint}, {}, 0) as study:
        trials = study.search(
            "search", problem, Random(table.space, 0), Looked(estimator), trials=12, batch=4,
            executor=Serial(), price=cost.estimate_codes,
        )  # fmt: skip
    assert len(trials) == 12
    for trial in trials:
        (row,) = table.rows(table.space.encode([trial.candidate]))
        assert trial.metrics["val_acc"].value == table.columns["val_acc"][row]
        assert trial.metrics["lat_pixel3"].value == table.columns["lat_pixel3"][row] <= bound


class Looked:
    """Evaluates one candidate by an estimator, as a study's worker does."""

    def __init__(self, estimator: object) -> None:
        self.estimator = estimator

    def __call__(self, candidate: object) -> dict[str, object]:
        return self.estimator.estimate([candidate]).readings()[0]  # type: ignore[attr-defined]


@pytest.mark.data
def test_nb_macro_chooses_by_one_training_and_reports_others(real_data: Path) -> None:
    table = tables.load("nb_macro")
    check_table(table)
    assert len(table) == table.space.size == 6_561
    runs = np.stack([table.columns[f"acc_{i}"] for i in (1, 2, 3)])
    assert runs.mean(axis=0).max() == pytest.approx(93.127, abs=0.0005)  # the published best mean
    assert (table.columns["val_acc"] == runs[0]).all()
    assert table.columns["test_acc"] == pytest.approx(runs[1:].mean(axis=0))


@pytest.mark.data
@pytest.mark.parametrize(("graph", "measured"), [("cora", 26_206), ("proteins", 2_021)])
def test_nb_graph_has_one_measured_architecture_of_each_kind(
    graph: str, measured: int, real_data: Path
) -> None:
    table = tables.load(f"nb_graph:graph={graph}")
    check_table(table)
    kinds = nb_graph_trees.kinds(table.space, table.codes)
    assert len(np.unique(kinds)) == measured
    assert len(table) == table.space.enumerate().shape[0]
    # rows of a kind have one number, and there are more rows than kinds
    order = np.argsort(kinds, kind="stable")
    same = np.diff(kinds[order]) == 0
    assert same.sum() == len(table) - measured
    for column in table.columns.values():
        assert (np.diff(column[order])[same] == 0).all()


def test_graph_networks_that_compute_the_same_are_of_one_kind() -> None:
    def of(link: str, *operators: str) -> dict[str, str]:
        return {"link": link, **{f"op{i}": name for i, name in enumerate(operators)}}

    groups = [
        # brothers in another order
        [of("0011", "gcn", "gat", "gin", "fc"), of("0011", "gcn", "gat", "fc", "gin")],
        # two branches in another order
        [of("0012", "gcn", "gat", "gin", "fc"), of("0012", "gat", "gcn", "fc", "gin")],
        # a skip that is read does nothing, wherever it stands
        [of("0123", "skip", "gcn", "gat", "gin"), of("0123", "gcn", "skip", "gat", "gin"),
         of("0123", "gcn", "gat", "gin", "skip")],
        [of("0122", "gcn", "gat", "skip", "gin")],  # here it hands the middle to the output
    ]  # fmt: skip
    found = [
        set(nb_graph_trees.kinds(nb_graph_trees.SPACE, nb_graph_trees.SPACE.encode(group)).tolist())
        for group in groups
    ]
    assert [len(kinds) for kinds in found] == [1, 1, 1, 1]
    assert len(set.union(*found)) == 4
    graphs = nb_graph_trees.graphs(nb_graph_trees.SPACE.encode([groups[3][0], groups[2][1]]))
    names = [[graphs.vocabulary[i] for i in row] for row in graphs.operators]
    assert names[0] == ["input", "gcn", "gat", "skip", "gin", "output"]
    assert np.argwhere(graphs.adjacency[0]).tolist() == [
        [0, 1], [1, 2], [2, 3], [2, 4], [3, 5], [4, 5]
    ]  # fmt: skip
    assert names[1] == ["input", "skip", "gcn", "gat", "gin", "output"]


@pytest.mark.data
@pytest.mark.parametrize("name", ["fbnet_latency", "ofa_latency"])
def test_latency_tables_are_costs_that_their_codes_explain(name: str, real_data: Path) -> None:
    table = tables.load(name)
    assert len(table) == 5_000
    assert (table.find(table.codes) == np.arange(5_000)).all()
    check_cost(table.cost(*list(table.columns)[:2]), table.space.decode(table.codes[:4]))
    assert table.encode is not None
    x = table.encode(table.codes)
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    y = table.columns["lat_raspi4" if name == "fbnet_latency" else "lat_v100_64"]
    weights = np.linalg.lstsq(x[:4000], y[:4000], rcond=None)[0]
    # were columns read in a wrong order, no linear model would predict held-out rows
    assert np.corrcoef(x[4000:] @ weights, y[4000:])[0, 1] > 0.99


# --- surrogates ------------------------------------------------------------------------------


def plain(codes: np.ndarray) -> np.ndarray:
    return np.asarray(codes, dtype=float)


def law(codes: np.ndarray) -> np.ndarray:
    return np.exp(0.01 * plain(codes) @ np.arange(12) / 12)


def test_a_surrogate_answers_for_every_candidate_and_states_its_error() -> None:
    rng = np.random.default_rng(0)
    codes = WIDE.sample(400, rng)
    values = {"exact": law(codes), "noise": np.exp(rng.normal(size=400))}
    values["exact"][:50] = np.nan
    models, held_out = fit(plain, codes, values)
    assert held_out["exact"].r2 > 0.999
    assert held_out["noise"].r2 < 0.1
    assert held_out["noise"].rows == 80
    assert held_out["exact"].rows < 80
    others = WIDE.sample(50, rng)
    assert models["exact"](others) == pytest.approx(law(others), rel=1e-2)
    about = {name: Metric(name, "ms", "min", "predicted") for name in values}
    table = Surrogate("made", WIDE, codes, values, about, "noise", "noise", "", models=models)
    both = np.concatenate([codes[:60], others])
    told = table.metrics(("exact", "noise"), both)
    assert told["noise"][:60].tolist() == values["noise"][:60].tolist()
    assert told["exact"][50:60].tolist() == values["exact"][50:60].tolist()
    assert told["exact"] == pytest.approx(law(both), rel=1e-2)
    assert (table.find(others) == -1).all()
    check_cost(table.cost("exact", "noise"), WIDE.decode(both[45:65]))
    with pytest.raises(DataError, match="every column needs a model"):
        Surrogate("made", WIDE, codes, values, about, "noise", "noise", "")


@pytest.mark.data
@pytest.mark.parametrize(("scale", "rows"), [("s", 10_000), ("m", 5_245)])
def test_hw_gpt_predicts_what_was_not_measured(scale: str, rows: int, real_data: Path) -> None:
    table = tables.load(f"hw_gpt:scale={scale}")
    assert isinstance(table, Surrogate)
    check_table(table)
    assert len(table) == rows
    assert sum(name.startswith("lat_") for name in table.columns) == 14
    # counts are exact for every row, by a formula of our own
    for name, counted in zip(
        ("params", "macs"), hw_gpt_space.counts(scale, table.codes), strict=True
    ):
        assert (counted == table.columns[name]).all()
    quality = table.held_out["perplexity"]
    assert quality.spearman > 0.999
    assert quality.error < 0.002
    assert min(e.spearman for n, e in table.held_out.items() if n.startswith("lat_")) > 0.92
    new = table.space.sample(200, np.random.default_rng(0))
    told = table.metrics(("perplexity", "lat_a100"), new)
    low, high = table.columns["perplexity"].min(), table.columns["perplexity"].max()
    assert ((told["perplexity"] > 0.95 * low) & (told["perplexity"] < 1.05 * high)).all()
    assert (told["lat_a100"] > 0).all()


@pytest.mark.data
def test_the_code_of_the_how_to_runs(real_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[1] / "docs" / "howto" / "tables.md").read_text()
    names: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S):
        exec(compile(block, "tables.md", "exec"), names)
    assert "73.48 % on test" in capsys.readouterr().out
    check_table(names["mine"])  # type: ignore[arg-type]
    # the errors stated on the page are those of the models
    for scale in "sm":
        errors = tables.load(f"hw_gpt:scale={scale}").held_out  # type: ignore[attr-defined]
        quality = errors["perplexity"]
        assert f"{quality.spearman:.4f}, {quality.error:.2%}" in page
