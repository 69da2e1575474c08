"""Regressors and features against independent computations; predictors as estimators, saved and read."""

from __future__ import annotations

import itertools
import json
import pickle
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.optimize import approx_fprime

from espalier.errors import DataError, EspalierError
from espalier.estimators.predictors import REGRESSORS, Predictor, make_regressor
from espalier.estimators.predictors.features import (
    Adjacency,
    Arranged,
    Neighbourhoods,
    OneHot,
    Paths,
    blocked,
)
from espalier.estimators.predictors.gaussian import Gaussian, _negative_log_posterior, _radii
from espalier.nets.graphs import Graphs
from espalier.problem import Metric, Reading
from espalier.space import Space, choice, integer, ordinal, real
from espalier.testing.estimator import check_estimator

SPACE = Space(
    [
        choice("a", "p", "q", "r"),
        integer("b", 0, 9),
        ordinal("c", 1, 2, 4, when={"a": ("p", "q")}),
        real("lr", 1e-4, 1e-1, log=True),
    ]
)
FAST = {"mlp": {"steps": 60, "members": 3}, "boosting": {"members": 2, "rounds": 30}}


def data(n=60, seed=0):
    """A smooth function of three columns with a little noise."""
    rng = np.random.default_rng(seed)
    x = rng.random((n, 3))
    return x, 5 + 3 * np.sin(3 * x[:, 0]) + 2 * x[:, 1] + 0.02 * rng.standard_normal(n)


def rank_correlation(a, b):
    return np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1]


# --- every regressor ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REGRESSORS)
def test_a_regressor_learns_and_is_the_same_again(name):
    if name == "boosting":
        pytest.importorskip("lightgbm")
    x, y = data()
    xt, yt = data(200, seed=1)
    model = make_regressor(name, **FAST.get(name, {}))
    model.fit(x, y, seed=3)
    mean, std = model.predict(xt)
    assert mean.shape == std.shape == (200,)
    assert rank_correlation(mean, yt) > 0.85
    assert (std >= 0).all()
    assert std.max() > 0
    again = make_regressor(name, **FAST.get(name, {}))
    again.fit(x, y, seed=3)
    assert np.array_equal(again.predict(xt)[0], mean)
    # what is saved is arrays, and predicts the same to the last bit
    arrays = {k: np.array(v) for k, v in model.arrays().items()}
    restored = make_regressor(name, **json.loads(json.dumps(model.settings())))
    restored.restore(arrays)
    for one, other in zip(model.predict(xt), restored.predict(xt), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("name", REGRESSORS)
def test_a_regressor_bears_one_row_and_equal_values(name):
    if name == "boosting":
        pytest.importorskip("lightgbm")
    model = make_regressor(name, **FAST.get(name, {}))
    for rows in (1, 5):
        model.fit(np.ones((rows, 2)), np.full(rows, 7.0))
        mean, std = model.predict(np.ones((3, 2)))
        assert np.allclose(mean, 7.0, atol=0.5)
        assert np.isfinite(std).all()


@pytest.mark.parametrize("name", REGRESSORS)
def test_a_regressor_says_what_is_wrong(name):
    if name == "boosting":
        pytest.importorskip("lightgbm")
    model = make_regressor(name)
    with pytest.raises(DataError, match="fitted before it predicts"):
        model.predict(np.zeros((1, 2)))
    with pytest.raises(DataError, match="finite"):
        model.fit(np.zeros((2, 2)), np.array([1.0, np.nan]))
    with pytest.raises(DataError, match="at least one row"):
        model.fit(np.zeros((0, 2)), np.zeros(0))


def test_an_unknown_regressor_or_setting_is_named():
    with pytest.raises(EspalierError, match="gaussian"):
        make_regressor("gausian")
    with pytest.raises(EspalierError, match="trees"):
        make_regressor("forest", tree=3)


# --- the Gaussian process -------------------------------------------------------------------------


def test_gaussian_predicts_as_scikit_learn():
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    x, y = data(40)
    xt, _ = data(20, seed=1)
    model = Gaussian()
    model.fit(x, y)
    weight, length, noise = np.exp(model._parameters)
    kernel = (
        ConstantKernel(weight) * Matern(length * model._scales[0], nu=2.5)
        + ConstantKernel(1.0)
        + WhiteKernel(noise + 1e-6)
    )
    other = GaussianProcessRegressor(kernel, optimizer=None, alpha=0.0)
    other.fit(x, (y - y.mean()) / y.std())
    mean, std = other.predict(xt, return_std=True)
    mine, spread = model.predict(xt)
    assert np.allclose(mine, y.mean() + y.std() * mean, atol=1e-6)
    assert np.allclose(spread, y.std() * std, rtol=1e-3)


def test_gaussian_gradient_is_that_of_its_value():
    x, y = data(25)
    bases = [_radii(x[:, :2], x[:, :2]), _radii(x[:, 2:], x[:, 2:]), x @ x.T]
    centre, spread = np.zeros(7), np.ones(7)
    args = (bases, (2,), y - y.mean(), centre, spread)
    p = np.array([0.3, -0.5, -1.0, 0.2, 0.1, 0.0, -2.0])
    _, gradient = _negative_log_posterior(p, *args)
    numeric = approx_fprime(p, lambda q: _negative_log_posterior(q, *args)[0], 1e-6)
    assert np.allclose(gradient, numeric, rtol=1e-3, atol=1e-3)
    with np.errstate(all="raise"):  # a line search that leaps comes back
        assert _negative_log_posterior(800 * np.ones(7), *args)[0] == 1e10


def test_gaussian_conditions_as_if_the_row_were_observed():
    x, y = data(30)
    xt, _ = data(12, seed=1)
    model = Gaussian(widths=(2, 1), linear=(1,))
    model.fit(x, y)
    belief = model.believe(xt)
    belief.condition(4)
    belief.condition(7)
    seen = Gaussian(widths=(2, 1), linear=(1,))
    seen.resume(model.hint())
    more = model.believe(xt[[4, 7]]).mean
    seen.update(np.concatenate([x, xt[[4, 7]]]), np.concatenate([y, more]))
    unit = seen._unit / model._unit  # the unit of values differs with the rows
    assert np.allclose(belief.std, seen.believe(xt).std / unit, rtol=1e-5, atol=1e-8)


def test_gaussian_goes_on_from_a_hint():
    x, y = data(50)
    model, other = Gaussian(), Gaussian()
    model.fit(x[:40], y[:40])
    other.resume(json.loads(json.dumps(model.hint())))
    for m in (model, other):
        m.update(x, y)
    assert np.array_equal(model.predict(x)[0], other.predict(x)[0])
    with pytest.raises(DataError, match="no hints"):
        make_regressor("forest").resume([1.0])


def test_gaussian_is_calibrated():
    x, y = data(80)
    xt, yt = data(400, seed=1)
    model = Gaussian()
    model.fit(x, y)
    mean, std = model.predict(xt)
    inside = np.mean(np.abs(yt - mean) < 2 * std)
    assert 0.8 < inside <= 1.0


def test_a_linear_block_goes_on_beyond_the_rows():
    x = np.linspace(-1, 1, 15)[:, None]
    curved, straight = Gaussian(), Gaussian(linear=(0,))
    for model in (curved, straight):
        model.fit(x, 2 * x[:, 0])
    far = np.array([[6.0]])
    assert straight.predict(far)[0][0] == pytest.approx(12, abs=0.5)
    assert curved.predict(far)[0][0] < 8


def test_many_rows_are_thinned():
    x, y = data(400)
    model = Gaussian(rows=100, fitted=50)
    model.fit(x, y)
    assert len(model.arrays()["x"]) == 100
    assert y.max() in model.arrays()["y"]
    assert rank_correlation(model.predict(x)[0], y) > 0.95


def test_blocks_must_fit_the_columns():
    with pytest.raises(DataError, match="columns"):
        Gaussian(widths=(2, 2)).fit(*data(10))


# --- trees and networks ---------------------------------------------------------------------------


def test_forest_mean_is_that_of_its_trees():
    x, y = data()
    model = make_regressor("forest", trees=7)
    model.fit(x, y, seed=1)
    mean, std = model.predict(x)
    each = np.stack([tree.predict(x) for tree in model._model.estimators_])
    assert np.allclose(mean, model._model.predict(x))
    assert np.allclose(std, each.std(axis=0))


def test_boosting_stops_at_the_mean_with_no_rounds_to_learn():
    pytest.importorskip("lightgbm")
    x, y = data()
    slow = make_regressor("boosting", rounds=1, rate=1e-6, share=1.0)
    slow.fit(x, y)
    assert np.allclose(slow.predict(x)[0], y.mean(), atol=1e-3)
    assert pickle.loads(pickle.dumps(slow)).predict(x)[0] == pytest.approx(slow.predict(x)[0])


def test_mlp_computes_what_its_weights_say():
    x, y = data(20)
    model = make_regressor("mlp", members=2, steps=5)
    model.fit(x, y)
    arrays = model.arrays()
    shift, scale, mean, unit = arrays["unit"]
    outputs = []
    for member in range(2):
        h = (x - shift) / scale
        for i in range(3):
            h = h @ arrays[f"weight{i}"][member] + arrays[f"bias{i}"][member]
            h = np.maximum(h, 0) if i < 2 else h
        outputs.append(mean[0] + unit[0] * h[:, 0])
    assert np.allclose(model.predict(x)[0], np.mean(outputs, axis=0), atol=1e-4)
    assert np.allclose(model.predict(x)[1], np.std(outputs, axis=0), atol=1e-4)


# --- features -------------------------------------------------------------------------------------


def test_one_hot_features_know_order_and_activity():
    codes = SPACE.encode([{"a": "p", "b": 0, "c": 1, "lr": 1e-4}, {"a": "r", "b": 9, "lr": 1e-1}])
    features = OneHot(SPACE)
    x = features(codes)
    assert x.shape == (2, sum(features.widths))
    assert features.widths == (len(SPACE.one_hot_names), 2)  # b and c; lr is one column already
    assert x[:, -2:].tolist() == [[0.0, 0.0], [1.0, 0.5]]


def test_arranged_features_are_two_blocks_on_one_scale():
    features = lambda codes: np.stack(  # noqa: E731
        [1e6 * codes[:, 1], codes[:, 0] == 0, np.ones(len(codes))], axis=1
    )
    made = blocked(features, SPACE)
    assert isinstance(made, Arranged)
    x = made(SPACE.sample(500, np.random.default_rng(1)))
    assert made.widths == (1, 1)  # the constant column is left out
    assert set(x[:, 0]) == {0.0, 1.0}
    assert abs(x[:, 1].mean()) < 0.2
    assert 0.8 < x[:, 1].std() < 1.2
    assert blocked(made, SPACE) is made


@dataclass(frozen=True)
class Chain:
    """Graphs for codes of a space of one decision: 0 is a diamond of conv and skip, 1 a chain."""

    def __call__(self, codes):
        vocabulary = ("", "input", "conv", "skip_connect", "pool", "output")
        operators, adjacency = [], np.zeros((len(codes), 5, 5), dtype=bool)
        for i, code in enumerate(np.asarray(codes)[:, 0].tolist()):
            if code == 0:
                operators.append([1, 2, 3, 4, 5])
                edges = [(0, 1), (0, 2), (1, 3), (2, 3), (3, 4)]
            else:
                operators.append([1, 2, 4, 0, 5])
                edges = [(0, 1), (1, 2), (2, 4)]
            for a, b in edges:
                adjacency[i, a, b] = True
        return Graphs(np.array(operators), adjacency, vocabulary)


def every_path(graphs, i):
    """All paths by brute force: every subset of nodes in order that is a walk."""
    nodes = np.flatnonzero(graphs.operators[i]).tolist()
    found = Counter()
    for size in range(1, len(nodes) + 1):
        for some in itertools.combinations(nodes, size):
            walk = all(graphs.adjacency[i, a, b] for a, b in itertools.pairwise(some))
            ends = (
                not graphs.adjacency[i, :, some[0]].any()
                and not graphs.adjacency[i, some[-1]].any()
            )
            if walk and ends:
                names = [graphs.vocabulary[graphs.operators[i, v]] for v in some]
                found[tuple(n for n in names if n != "skip_connect")] += 1
    return found


def test_paths_are_those_that_brute_force_finds():
    codes = np.array([[0], [1]], dtype=np.int8)
    graphs = Chain()(codes)
    x = Paths(Chain(), columns=4096)(codes)
    for i in range(2):
        counts = sorted(every_path(graphs, i).values())
        assert sorted((x[i][x[i] > 0] ** 2).round(6).tolist()) == counts
    # input-conv-pool-output is in both
    assert (x[0] * x[1] > 0).sum() == 1


def test_neighbourhoods_count_labels_at_every_depth():
    codes = np.array([[0], [1]], dtype=np.int8)
    x = Neighbourhoods(Chain(), depth=1, columns=4096)(codes) ** 2
    assert x.sum(axis=1).tolist() == [10.0, 8.0]  # a label a node at depths 0 and 1
    # shared: at depth 0 input, conv, pool, output; at depth 1 input(), conv(input), output(pool)
    assert np.minimum(x[0], x[1]).sum() == 7


def test_adjacency_holds_edges_and_operators():
    x = Adjacency(Chain())(np.array([[0], [1]], dtype=np.int8))
    assert x.shape == (2, 10 + 5 * 6)
    assert x.sum(axis=1).tolist() == [5 + 5, 3 + 5]


@pytest.mark.data
def test_features_of_nb201_are_equal_where_cells_compute_the_same(real_data: Path):
    from espalier.bench import tables
    from espalier.bench.tables.nb201_features import costs, encode, live, paths

    table = tables.load("nb201:dataset=cifar100")
    x = encode(table.codes)
    assert x.shape == (15_625, sum(encode.widths))
    # path by path, and written here anew: op on edge (to, from) of columns 10 20 21 30 31 32
    rng = np.random.default_rng(0)
    for row in rng.choice(len(table), 60, replace=False):
        c = table.codes[row].tolist()
        ways = [(3,), (0, 4), (1, 5), (0, 2, 5)]
        walks = Counter(
            tuple(c[j] for j in way if c[j] != 1) for way in ways if all(c[j] != 0 for j in way)
        )
        got = paths(table.codes[row : row + 1])[0] ** 2
        assert sorted(got[got > 0].round(6).tolist()) == sorted(walks.values())
        used = {j for way in ways if all(c[j] != 0 for j in way) for j in way}
        assert live(table.codes[row : row + 1])[0].tolist() == [
            v if j in used else 0 for j, v in enumerate(c)
        ]
    whole = (live(table.codes) == table.codes).all(axis=1)
    real_costs = np.log(table.columns["params"][whole])
    assert np.corrcoef(costs(table.codes[whole])[:, 0], real_costs)[0, 1] > 0.999


# --- the predictor --------------------------------------------------------------------------------


def fitted(regressor="gaussian", n=40):
    codes = SPACE.sample(n, np.random.default_rng(0))
    values = codes[:, 1] + 3.0 * (codes[:, 0] == 1)
    return Predictor(SPACE, "accuracy", regressor=regressor).fit(codes, values)


@pytest.mark.parametrize("name", ["gaussian", "extra_trees", "mlp"])
def test_a_predictor_is_an_estimator(name, tmp_path):
    predictor = fitted(make_regressor(name, **FAST.get(name, {})) if name != "gaussian" else name)
    candidates = SPACE.decode(SPACE.sample(4, np.random.default_rng(5)))
    check_estimator(predictor, candidates)
    assert predictor.metric == Metric("accuracy", "", "max", "predicted", "")
    predictor.save(tmp_path)
    again = Predictor.load(tmp_path)
    check_estimator(again, candidates)
    assert np.array_equal(
        again.estimate(candidates)["accuracy"], predictor.estimate(candidates)["accuracy"]
    )
    reading = predictor.estimate(candidates).readings()[0]["accuracy"]
    assert reading.how == "predicted"
    assert reading.spread is not None
    many = predictor.estimate_codes(SPACE.encode(candidates))["accuracy"]
    assert np.allclose(many, predictor.estimate(candidates)["accuracy"])


def test_a_predictor_learns_from_a_study():
    codes = SPACE.sample(30, np.random.default_rng(0))
    trials = [
        SimpleNamespace(
            state="done" if i else "failed",
            candidate=c,
            metrics={"accuracy": Reading(float(c["b"]))} if i != 1 else {},
        )
        for i, c in enumerate(SPACE.decode(codes))
    ]
    study = SimpleNamespace(trials=lambda phase=None: trials if phase != "none" else [])
    predictor = Predictor(SPACE, Metric("accuracy", "%", "max", "measured", "validation"))
    predictor.fit_study(study, "search")
    assert predictor.rows == 28
    assert rank_correlation(predictor.predict(codes)[0], codes[:, 1]) > 0.9
    assert predictor.metric.split == "validation"
    with pytest.raises(DataError, match="no finished trial"):
        predictor.fit_study(study, "none")


def test_a_predictor_refuses_what_it_cannot_use(tmp_path):
    predictor = Predictor(SPACE, "accuracy")
    codes = SPACE.sample(5, np.random.default_rng(0))
    with pytest.raises(DataError, match="knows no data"):
        predictor.predict(codes)
    with pytest.raises(DataError, match="knows no data"):
        predictor.save(tmp_path)
    with pytest.raises(DataError, match="no row has"):
        predictor.fit(codes, [np.nan] * 5)
    with pytest.raises(DataError, match="no predictor"):
        Predictor.load(tmp_path / "nowhere")
    predictor.fit(codes, [1.0, np.nan, 2.0, 3.0, 4.0])
    assert predictor.rows == 4
    predictor.save(tmp_path)
    text = (tmp_path / "predictor.json").read_text()
    (tmp_path / "predictor.json").write_text(text.replace("espalier predictor", "another"))
    with pytest.raises(DataError, match="another"):
        Predictor.load(tmp_path)


def test_own_features_are_given_again_at_load(tmp_path):
    def counts(codes):
        return np.asarray(codes[:, :2], dtype=float)

    codes = SPACE.sample(20, np.random.default_rng(0))
    predictor = Predictor(SPACE, "accuracy", counts).fit(codes, codes[:, 1])
    predictor.save(tmp_path)
    with pytest.raises(DataError, match="give features="):
        Predictor.load(tmp_path)
    with pytest.raises(DataError, match="columns"):
        Predictor.load(tmp_path, lambda codes: np.asarray(codes[:, 1:2], dtype=float))
    again = Predictor.load(tmp_path, counts)
    assert np.array_equal(again.predict(codes)[0], predictor.predict(codes)[0])
