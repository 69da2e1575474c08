"""The table that ships: its family, its file, and that it holds what training gives."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from itertools import product
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau

from espalier import train
from espalier.bench.tables import digits, load
from espalier.costs import count
from espalier.errors import DataError, SpaceError
from espalier.estimators import Trained
from espalier.nets.digits_cells import DigitsCells
from espalier.testing import check_family
from espalier.train.seeds import global_seed

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "digits_table", ROOT / "benchmarks" / "digits_table.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["digits_table"] = module
    spec.loader.exec_module(module)
    torch.set_num_threads(1)
    return module


# --- the family ---------------------------------------------------------------------------------


def test_the_family_conforms():
    check_family(DigitsCells(), seed=1)
    check_family(DigitsCells((3, 9, 6), 4), seed=2)


def test_every_network_is_there_once():
    # by hand: 3 widths, 2 heads, and in each of two stages 0, 1 or 2 of 4 operations
    stage = [layers for depth in range(3) for layers in product("abcd", repeat=depth)]
    codes = DigitsCells().space.enumerate()
    assert len(codes) == 3 * 2 * len(stage) ** 2 == 2646
    assert len(DigitsCells().space.unique(codes)) == 2646


@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 7, 5)])
def test_counts_by_formula_are_those_of_the_built_network(shape):
    family = DigitsCells(shape, 7)
    codes = family.space.sample(40, np.random.default_rng(0))
    params, macs = family.counts(codes)
    for i, candidate in enumerate(family.space.decode(codes)):
        found = count(family.build(candidate), family.example())
        assert (found.params, found.macs) == (params[i], macs[i]), candidate


def test_graphs_are_chains_of_the_layers_in_order():
    family = DigitsCells()
    codes = family.space.enumerate()[::37]
    graphs = family.graphs(codes)
    for i, candidate in enumerate(family.space.decode(codes)):
        words = [graphs.vocabulary[j] for j in graphs.operators[i] if j]
        assert (words[0], words[-1]) == ("input", "output")
        width = candidate["width"]
        first = [f"{candidate[f'op1.{j}']}/{width}" for j in range(candidate["depth1"])]
        second = [f"{candidate[f'op2.{j}']}/{2 * width}" for j in range(candidate["depth2"])]
        layers = [f"stem/{width}", *first, f"wide/{2 * width}", *second, candidate["head"]]
        assert words[1:-1] == layers
        steps = len(words) - 1
        assert graphs.adjacency[i].sum() == steps
        assert all(graphs.adjacency[i, j, j + 1] for j in range(steps))
    kinds = {graphs.operators[i].tobytes() for i in range(len(codes))}
    assert len(kinds) == len(codes)


def test_an_image_that_cannot_be_halved_is_refused():
    with pytest.raises(SpaceError, match="at least 2x2 pixels, got shape"):
        DigitsCells((1, 1, 8))


# --- the script ---------------------------------------------------------------------------------


def test_networks_trained_together_learn_what_each_learns_alone(script):
    family, data = DigitsCells(), script.task()
    recipe = train.Recipe(epochs=2, batch=32, lr=0.05, clip=float("inf"), precision="fp32")
    for row in (100, 2640):
        codes = family.space.enumerate()[row : row + 1]
        candidate = family.space.decode(codes)[0]
        seeds = [script.seed_of(candidate, s) for s in range(2)]
        networks = []
        for seed in seeds:
            with global_seed(seed):
                networks.append(family.build(candidate))
        joined = script.together(networks)
        for _ in script.epochs(joined, data, recipe, seeds):
            pass
        x, _ = next(data.batches("test", 64))
        with torch.inference_mode():
            found = joined.eval()(x.repeat(1, 2, 1, 1))
        for i, (network, seed) in enumerate(zip(networks, seeds, strict=True)):
            train.fit(network, data, recipe, seed)
            with torch.inference_mode():
                alone = network.eval()(x)
            assert torch.allclose(found[:, i], alone, atol=1e-2), (candidate, i)
            assert not torch.allclose(found[:, 1 - i], alone, atol=1e-1)


def test_what_was_written_is_not_done_again(script, tmp_path):
    path, calls = tmp_path / "rows.jsonl", []

    def work(row):
        calls.append(row)
        return {"value": row * row}

    script.step(path, 10, 4, work, 0)
    path.write_text(path.read_text() + '{"row": 3, "val')  # killed while it wrote
    script.step(path, 10, 100, work, 0)
    assert sorted(calls) == list(range(10))
    assert {r: e["value"] for r, e in script.rows_of(path).items()} == {r: r * r for r in range(10)}


# --- the reader ---------------------------------------------------------------------------------


def small(path: Path, **changes: np.ndarray | None) -> str:
    """A tiny table of the right schema, with some arrays replaced or left out; gives its SHA-256."""
    space, rng, n = DigitsCells().space, np.random.default_rng(0), 6
    arrays = {
        "codes": space.enumerate()[:: 2646 // n][:n].astype(np.int8),
        "validation": rng.integers(0, 51, (n, 3, 4)).astype(np.uint16),
        "test": rng.integers(0, 26, (n, 3, 4)).astype(np.uint16),
        "images": np.array([50, 25], dtype=np.uint16),
        "params": rng.integers(1, 100, n).astype(np.uint32),
        "macs": rng.integers(1, 100, n).astype(np.uint32),
        "latency_ms": rng.random(n).astype(np.float32),
        "epoch_seconds": rng.random(n).astype(np.float32),
        "space": np.array(space.fingerprint),
        "data": np.array("0" * 16),
        **changes,
    }
    np.savez_compressed(path, **{k: v for k, v in arrays.items() if v is not None})
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_counts_become_percent_one_training_chooses_and_all_report(tmp_path):
    path = tmp_path / "t.npz"
    table = digits.read(path, small(path))
    with np.load(path) as file:
        validation, test = file["validation"], file["test"]
    assert table.columns["val_acc"] == pytest.approx(validation[:, 0, -1] / 50 * 100)
    assert table.columns["test_acc"] == pytest.approx(test[:, :, -1].sum(1) / 75 * 100)
    assert table.curves["test_acc"][2, 1] == pytest.approx(test[2, 1] * 4.0)
    assert (table.validation, table.test) == ("val_acc", "test_acc")
    assert table.find(table.codes).tolist() == list(range(6))
    assert table.find(table.space.enumerate()).max() == 5
    assert (table.find(table.space.enumerate()) >= 0).sum() == 6


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"test": None}, "lacks the array 'test'"),
        ({"macs": np.ones(6)}, "'macs' must be uint32"),
        ({"params": np.ones(5, dtype=np.uint32)}, "'params' must be uint32 with 6 rows"),
        ({"validation": np.ones((6, 4), dtype=np.uint16)}, "'validation' must be uint16"),
        ({"space": np.array("f" * 16)}, "of another space"),
        ({"data": np.array([{}], dtype=object)}, "no readable .npz file of plain arrays"),
    ],
)
def test_another_form_is_refused(tmp_path, changes, rule):
    path = tmp_path / "t.npz"
    digest = small(path, **changes)
    with pytest.raises(DataError, match=rule):
        digits.read(path, digest)


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "t.npz"
    digest = small(path)
    with pytest.raises(DataError, match="SHA-256"):
        digits.read(path, digest[::-1])
    with pytest.raises(DataError, match="missing"):
        digits.read(tmp_path / "none.npz", digest)
    path.write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(DataError, match="no readable"):
        digits.read(path, hashlib.sha256(path.read_bytes()).hexdigest())


def test_features_tell_candidates_apart_and_hold_the_counts():
    family = DigitsCells()
    codes = family.space.enumerate()
    found = digits.encode(codes)
    assert len(np.unique(found, axis=0)) == 2646
    candidate = family.space.decode(codes[-1:])[0]
    real = count(family.build(candidate), family.example())
    assert np.exp(found[-1, -2:]) == pytest.approx([real.params, real.macs])
    twice = family.space.encode(
        [{"width": 4, "head": "flat", "depth1": 2, "op1.0": "conv1", "op1.1": "conv1", "depth2": 0}]
    )
    assert 2.0 in digits.encode(twice)[0, len(family.space.one_hot_names) : -2]


# --- the table ----------------------------------------------------------------------------------

needs_table = pytest.mark.skipif(not digits.FILE.exists(), reason="the table is not made yet")


@needs_table
def test_the_table_ships_without_any_data(monkeypatch):
    monkeypatch.delenv("ESPALIER_DATA", raising=False)
    table = load("digits")
    assert len(table) == 2646
    assert np.array_equal(table.codes, table.space.enumerate())
    assert table.curves["val_acc"].shape == table.curves["test_acc"].shape == (2646, 3, 9)
    assert digits.FILE.stat().st_size < 600_000
    for name in ("val_acc", "test_acc"):
        assert 0 <= table.columns[name].min() < 50  # there are poor networks,
        assert table.columns[name].max() > 96  # and good ones


@needs_table
def test_the_counts_of_the_table_are_those_of_the_networks():
    table = load("digits")
    params, macs = DigitsCells().counts(table.codes)
    assert np.array_equal(table.columns["params"], params)
    assert np.array_equal(table.columns["macs"], macs)
    assert (table.columns["latency_ms"] > 0).all()
    assert table.epoch_seconds is not None
    assert (table.epoch_seconds > 0).all()


@needs_table
def test_the_table_says_what_training_gives(script):
    table, family, data = load("digits"), DigitsCells(), script.task()
    with np.load(digits.FILE, allow_pickle=False) as file:
        assert str(file["data"]) == data.fingerprint
    for row, seed in ((17, 0), (1234, 1)):
        candidate = family.space.decode(table.codes[row : row + 1])[0]
        estimator = Trained(family, data, script.RECIPE, seed)
        found = float(estimator.estimate([candidate])["accuracy"][0]) * 100
        # other processors add in another order: a few of 500 images may fall otherwise
        assert found == pytest.approx(table.curves["val_acc"][row, seed, -1], abs=2.0), candidate


@needs_table
def test_the_figures_that_the_docstring_and_the_source_state():
    table = load("digits")
    test = table.curves["test_acc"][:, :, -1]
    assert kendalltau(test[:, 1], test[:, 2])[0] == pytest.approx(0.752, abs=5e-4)
    for name, stated in (("params", 0.717), ("macs", 0.494)):
        found = kendalltau(table.columns[name], table.columns["test_acc"])[0]
        assert found == pytest.approx(stated, abs=5e-4), name
    best, largest = table.best(), table.columns["macs"].max()
    assert table.columns["macs"][best] < largest
    assert table.columns["macs"][int(table.columns["test_acc"].argmax())] < largest
    # one training chooses, others report: the best by validation need not be the best by test
    regret = table.regret(np.arange(len(table)))
    assert regret.min() == 0 < regret[best]


@needs_table
def test_latency_is_a_sum_over_layers_but_for_a_few(script):
    latency = load("digits").columns["latency_ms"]
    layers = script.layer_features(DigitsCells())
    error = np.abs(layers @ script.relative(layers, latency) / latency - 1)
    assert np.median(error) < 0.05
    assert np.quantile(error, 0.99) < 0.2  # none that other work has slowed down
