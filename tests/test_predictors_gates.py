"""GATES against loops over edges, its loss by hand, and what it must not depend on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import kendalltau

from espalier.errors import DataError, EspalierError
from espalier.estimators.predictors import Predictor
from espalier.estimators.predictors.cells import NB201, Cell
from espalier.estimators.predictors.encoders import (
    GCN,
    FlowOnEdges,
    GatesOnEdges,
    GatesOnNodes,
)
from espalier.estimators.predictors.gates import Gates
from espalier.estimators.predictors.inputs import Reader
from espalier.estimators.predictors.ranking import Learning, hinge
from espalier.estimators.predictors.scale import Scale
from espalier.estimators.predictors.scorer import Shape
from espalier.space import Space, choice

RNG = np.random.default_rng(0)
CODES = RNG.integers(0, 5, (60, 6))
SMALL = Shape(members=2, width=8, layers=3, hidden=8, dropout=0.0)


@dataclass(frozen=True)
class Nodes:
    operators: NDArray[np.int64]
    adjacency: NDArray[np.bool_]
    vocabulary: tuple[str, ...]


def quality(codes: NDArray[np.int64]) -> NDArray[np.float64]:
    """A made-up quality: weights count, a direct skip helps, so does depth of convolutions."""
    live = NB201.pruned(codes)
    return np.log1p(NB201.weight(codes)) + (live[:, 3] == 1) + (live[:, 0] == 3) * (live[:, 4] == 3)


def paths(row: NDArray[np.int64]) -> list[list[int]]:
    """All paths of edges from input to output without a "none", by recursion."""

    def onward(node: int) -> list[list[int]]:
        if node == NB201.nodes - 1:
            return [[]]
        return [
            [e, *rest]
            for e, (a, b) in enumerate(NB201.edges)
            if a == node and row[e] != 0
            for rest in onward(b)
        ]

    return onward(0)


def test_an_edge_lives_when_it_is_on_a_path() -> None:
    for row, pruned in zip(CODES, NB201.pruned(CODES), strict=True):
        live = {e for path in paths(row) for e in path}
        assert pruned.tolist() == [int(o) if e in live else 0 for e, o in enumerate(row)]


def test_the_weight_count_is_of_live_operators() -> None:
    codes = np.array([[3, 0, 0, 2, 0, 0], [3, 3, 3, 3, 3, 3]])
    assert NB201.weight(codes).tolist() == [1.0, 54.0]  # the first 3x3 leads nowhere


def test_line_graphs_have_the_paths_of_the_cell() -> None:
    operators, adjacency = NB201.line_graph(CODES)
    for i, row in enumerate(CODES):
        power, count = np.eye(len(adjacency[i])), 0.0
        for _ in range(len(power)):
            power = power @ adjacency[i]
            count += power[0, -1]
        assert count == len(paths(row))
        assert set(operators[i, 1:-1]) <= {0, *(int(o) + 3 for o in row if o)}


def test_a_cell_refuses_what_it_can_not_read() -> None:
    with pytest.raises(DataError, match="6 columns"):
        NB201.pruned(np.zeros((2, 5), int))
    with pytest.raises(DataError, match="indices of 5"):
        NB201.pruned(np.full((2, 6), 5))
    with pytest.raises(DataError, match="lower node"):
        Cell(((1, 0),), ("none", "conv"), (0.0, 1.0))


def on_edges() -> tuple[GatesOnEdges, torch.Tensor]:
    torch.manual_seed(0)
    encoder = GatesOnEdges(NB201.edges, 5, members=2, width=4, layers=3, dropout=0.0).eval()
    with torch.no_grad():
        for layer in encoder.pass_on:
            layer.bias.normal_()  # zeros would hide a forgotten bias
    return encoder, Reader(NB201).fit(CODES).graphs[0]


def test_gates_on_edges_is_the_loop_over_edges() -> None:
    encoder, chosen = on_edges()
    found = encoder(chosen).detach().numpy()
    pruned = NB201.pruned(CODES)
    for m in range(2):
        for i in range(20):
            h = [np.zeros(4) for _ in range(4)]
            h[0] = encoder.start[m, 0, 0].detach().numpy()
            for k in range(3):
                weight, bias = (p[m].detach().numpy() for p in encoder.pass_on[k].parameters())
                attend = encoder.attend[k].weight[m].detach().numpy()
                z = [v @ weight + bias[0] for v in h]
                new = [v.copy() for v in z]
                for e, (a, b) in enumerate(NB201.edges):
                    if pruned[i, e] != NB201.none:
                        logit = encoder.operators[m, pruned[i, e]].detach().numpy() @ attend
                        new[b] += z[a] / (1 + np.exp(-logit))
                h = new if k == 2 else [np.maximum(v, 0) for v in new]
            assert found[m, i] == pytest.approx(h[-1], abs=1e-5)


@pytest.mark.parametrize("kind", [GatesOnNodes, GCN])
def test_encoders_of_nodes_are_loops_over_nodes(kind: type[GatesOnNodes] | type[GCN]) -> None:
    torch.manual_seed(0)
    encoder = kind(7, members=2, width=4, layers=3, dropout=0.0).eval()
    layers = encoder.pass_on if isinstance(encoder, GatesOnNodes) else encoder.mix
    with torch.no_grad():
        for layer in layers:
            layer.bias.normal_()
    found = encoder(*Reader(NB201, on_edges=False).fit(CODES).graphs).detach().numpy()
    operators, adjacency = NB201.line_graph(CODES)
    embedded = encoder.operators.detach().numpy()
    for m in range(2):
        for i in range(20):
            real = np.flatnonzero(operators[i])
            feeds = {b: [a for a in real if adjacency[i, a, b]] for b in real}
            last = [a for a in real if not any(a in feeds[b] for b in real)]
            of = {v: embedded[m, operators[i, v] - 1] for v in real}
            if isinstance(encoder, GatesOnNodes):
                start = encoder.start[m, 0, 0].detach().numpy()
                h = {v: np.zeros(4) if feeds[v] else start for v in real}
            else:
                h = dict(of)
            for k in range(3):
                weight, bias = (p[m].detach().numpy() for p in layers[k].parameters())
                if isinstance(encoder, GatesOnNodes):
                    attend = encoder.attend[k].weight[m].detach().numpy()
                    z = {v: h[v] @ weight + bias[0] for v in real}
                    gate = {v: 1 / (1 + np.exp(-(of[v] @ attend))) for v in real}
                    h = {v: z[v] + gate[v] * sum(z[a] for a in feeds[v]) for v in real}
                else:
                    mean = {v: np.mean([h[v], *(h[a] for a in feeds[v])], 0) for v in real}
                    h = {v: mean[v] @ weight + bias[0] for v in real}
                if k < 2:
                    h = {v: np.maximum(h[v], 0) for v in real}
            nodes = last if isinstance(encoder, GatesOnNodes) else real
            assert found[m, i] == pytest.approx(np.mean([h[v] for v in nodes], 0), abs=1e-5)


def test_flow_is_the_same_for_cells_that_compute_the_same() -> None:
    def value(row: NDArray[np.int64]) -> object:
        """What a cell computes, as nested multisets: skips are transparent, orders forgotten."""
        at: dict[int, tuple[object, ...]] = {0: ("input",)}
        for node in (1, 2, 3):
            parts: list[object] = []
            for e, (a, b) in enumerate(NB201.edges):
                if b == node and row[e] == 1:
                    parts += at[a]
                elif b == node and row[e] > 1 and at[a]:
                    parts.append((int(row[e]), at[a]))
            at[node] = tuple(sorted(parts, key=repr))
        return at[3]

    torch.manual_seed(0)
    encoder = FlowOnEdges(NB201.edges, 5, NB201.skip, members=2, width=8, dropout=0.0).eval()
    codes = np.random.default_rng(2).integers(0, 5, (1500, 6))
    with torch.no_grad():
        found = encoder(*Reader(NB201).fit(codes).graphs).numpy()
    groups: dict[object, list[int]] = {}
    for i, row in enumerate(NB201.pruned(codes)):
        groups.setdefault(value(row), []).append(i)
    twins = [g for g in groups.values() if len({tuple(codes[i]) for i in g}) > 1]
    assert len(twins) > 50
    for group in twins:
        assert np.ptp(found[:, group], axis=1).max() < 1e-4
    ones = found[0, [g[0] for g in groups.values()]]
    assert len(np.unique(ones.round(3), axis=0)) > 0.95 * len(groups)


def test_the_hinge_by_hand() -> None:
    scores = torch.tensor([[1.0, 0.95, 0.0], [0.0, 0.5, 1.0]])
    labels = torch.tensor([3.0, 2.0, 1.0])
    # pairs (0, 1), (0, 2), (1, 2): of the first 0.05, 0, 0; of the second 0.6, 1.1, 0.6
    assert hinge(scores, labels, 0.1).tolist() == pytest.approx([0.05 / 3, 2.3 / 3])
    assert hinge(scores, labels, 0.1, gap=1.5).tolist() == pytest.approx([0.0, 1.1])
    assert hinge(scores, torch.ones(3), 0.1).tolist() == [0.0, 0.0]
    unknown = torch.tensor([[3.0, float("nan"), 1.0], [3.0, 2.0, float("nan")]])
    assert hinge(scores, unknown, 0.1).tolist() == pytest.approx([0.0, 0.6])


def test_members_learn_as_if_alone() -> None:
    scores = torch.randn(3, 8, requires_grad=True)
    labels = torch.randn(8)
    hinge(scores, labels, 0.1).sum().backward()
    alone = scores[1:2].detach().requires_grad_()
    hinge(alone, labels, 0.1).sum().backward()
    assert scores.grad is not None
    assert alone.grad is not None
    assert torch.equal(scores.grad[1], alone.grad[0])


def test_the_order_of_nodes_does_not_matter() -> None:
    operators, adjacency = NB201.line_graph(CODES)
    order = RNG.permutation(8)
    vocabulary = ("", "input", "output", *NB201.operators)[: 3 + len(NB201.operators)]
    plain = Nodes(operators, adjacency, vocabulary)
    shuffled = Nodes(operators[:, order], adjacency[:, order][:, :, order], vocabulary)
    for name in ("gates", "gcn"):
        learned = Gates(shape=Shape(name, 2, 8, 3, 8, dropout=0.0), learning=Learning(steps=2))
        learned.fit(plain, quality(CODES))
        assert learned.predict(shuffled)[0] == pytest.approx(learned.predict(plain)[0], abs=1e-4)


def test_it_ranks_cells_that_it_has_not_seen() -> None:
    rng = np.random.default_rng(1)
    codes, more = rng.integers(0, 5, (100, 6)), rng.integers(0, 5, (400, 6))
    learned = Gates(NB201, shape=Shape(members=2, width=24), weights=False)
    learned.fit(codes, quality(codes))
    mean, std = learned.predict(more)
    assert kendalltau(mean, quality(more))[0] > 0.75
    assert (std >= 0).all()
    assert std.max() > 0
    assert (
        np.abs(mean - quality(more)).mean() < np.abs(quality(codes).mean() - quality(more)).mean()
    )


def test_one_seed_one_predictor_and_it_survives_a_file() -> None:
    fits = []
    for seed in (3, 3, 4):
        learned = Gates(NB201, shape=SMALL, learning=Learning(steps=20, batch=32))
        torch.manual_seed(seed + len(fits))  # the global generator must not matter
        learned.fit(CODES, quality(CODES), seed)
        fits.append(learned.predict(CODES))
    assert np.array_equal(fits[0], fits[1])
    assert not np.array_equal(fits[0], fits[2])
    again = Gates(NB201, shape=SMALL)
    again.restore(learned.arrays())
    assert np.array_equal(again.predict(CODES), fits[2])
    assert json.loads(json.dumps(learned.settings()))["shape"]["width"] == 8
    with pytest.raises(DataError, match="other sizes"):
        Gates(NB201, shape=Shape(members=3, width=8)).restore(learned.arrays())


def test_scales_are_increasing_lines() -> None:
    scores = np.array([[0.0, 1.0, 2.0], [5.0, 5.1, 5.2]])
    scale = Scale.of(scores, np.array([10.0, 20.0, 30.0]))
    mean, std = scale.values(scale.standard(scores))
    assert mean == pytest.approx([10.0, 20.0, 30.0])
    assert std == pytest.approx(np.zeros(3), abs=1e-9)
    against = Scale.of(scores, np.array([30.0, 20.0, 10.0]))
    assert against.slope > 0  # an ensemble that learnt nothing still keeps its order


def test_what_it_refuses() -> None:
    with pytest.raises(DataError, match="fit first"):
        Gates(NB201).predict(CODES)
    with pytest.raises(DataError, match="at least 2 labels"):
        Gates(NB201).fit(CODES[:1], [1.0])
    with pytest.raises(DataError, match="finite"):
        Gates(NB201).fit(CODES[:2], [1.0, float("nan")])
    with pytest.raises(EspalierError, match="steps=0"):
        Learning(steps=0)
    with pytest.raises(EspalierError, match="unknown encoder 'gats'"):
        Gates(NB201, shape=Shape("gats")).fit(CODES, quality(CODES))


@pytest.mark.parametrize("steps", [1, 2, 8, 10, 19])
def test_few_steps_are_taken_too(steps: int) -> None:
    learned = Gates(NB201, shape=SMALL, learning=Learning(steps=steps))
    learned.fit(CODES, quality(CODES))
    assert np.isfinite(learned.predict(CODES)[0]).all()


def test_it_is_an_estimator_s_regressor(tmp_path: Path) -> None:
    def make() -> Gates:
        return Gates(NB201, shape=SMALL, learning=Learning(steps=10))

    space = Space([choice(f"op{i}", *NB201.operators) for i in range(6)])
    codes = CODES.astype(space.dtype)
    predictor = Predictor(space, "accuracy", lambda c: c.astype(float), make())
    predictor.fit(codes, quality(CODES))
    predictor.save(tmp_path)
    again = Predictor.load(tmp_path, lambda c: c.astype(float), make)
    assert np.array_equal(again.predict(codes), predictor.predict(codes))
    metrics = predictor.estimate(space.decode(codes[:3]))
    assert metrics["accuracy"] == pytest.approx(predictor.predict(codes[:3])[0], rel=1e-4)
