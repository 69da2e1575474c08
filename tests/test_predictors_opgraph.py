"""Operator graphs against a network by hand, and against shuffled and renamed files."""

from __future__ import annotations

import json
import random

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from espalier.errors import DataError
from espalier.estimators.predictors.opgraph import (
    NUMBERS,
    Operator,
    OpGraph,
    canonical,
    from_onnx,
    from_torch,
    stack,
)
from espalier.export import to_onnx
from espalier.nets.nb201 import NB201


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, stride=1, padding=1, groups=2)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = x + self.second(x)
        return self.last(self.drop(x.mean((2, 3))))  # type: ignore[no-any-return]


EXAMPLE = torch.zeros(1, 3, 6, 6)
MACS = 8 * 3 * 9 * 36 + 8 * 4 * 9 * 36 + 8 * 5
PARAMS = 8 * 3 * 9 + 8 + 8 * 4 * 9 + 8 + 8 * 5 + 5


def shuffled(model: onnx.ModelProto, seed: int) -> onnx.ModelProto:
    """The same network, its nodes listed in another order, all names changed."""
    out = onnx.ModelProto()
    out.CopyFrom(model)
    rng = random.Random(seed)
    nodes = list(out.graph.node)
    rng.shuffle(nodes)
    # a valid file lists nodes after those that feed them: the first that is ready, of a random list
    made = {t.name for t in out.graph.initializer} | {v.name for v in out.graph.input} | {""}
    order = []
    while nodes:
        node = next(n for n in nodes if all(x in made for x in n.input))
        nodes.remove(node)
        order.append(node)
        made |= set(node.output)
    new = {name: f"t{rng.random()}" for name in made if name}
    for node in order:
        node.name = f"n{rng.random()}"
        for field in (node.input, node.output):
            names = [new.get(x, x) for x in field]
            del field[:]
            field.extend(names)
    for part in (out.graph.initializer, out.graph.input, out.graph.output):
        for value in part:
            value.name = new[value.name]
    del out.graph.value_info[:]
    del out.graph.node[:]
    out.graph.node.extend(order)
    return out


def test_a_tiny_network_by_hand() -> None:
    graph = from_onnx(to_onnx(Tiny(), EXAMPLE, fast=True))
    assert [o.kind for o in graph.operators] == [
        "Conv",
        "Relu",
        "Conv",
        "Add",
        "ReduceMean",
        "Gemm",
    ]
    edges = {(0, 1), (1, 2), (1, 3), (2, 3), (3, 4), (4, 5)}
    assert set(zip(*np.nonzero(graph.adjacency), strict=True)) == edges
    first, second = graph.operators[0], graph.operators[2]
    assert (first.weights[0], first.shapes, first.output) == ((8, 3, 3, 3), ((3, 6, 6),), (8, 6, 6))
    assert second.setting("group") == 2
    assert graph.lines()[0].startswith("Conv(")
    assert graph.lines()[0].endswith("3x6x6)->8x6x6")
    assert graph.macs == MACS
    assert graph.params == PARAMS
    assert graph.numbers.shape == (6, len(NUMBERS))
    assert graph.numbers[2, NUMBERS.index("groups")] == pytest.approx(np.log(2))
    assert graph.numbers[0, NUMBERS.index("weights")] == pytest.approx(np.log1p(8 * 3 * 9 + 8))


def test_torch_export_gives_the_same_operators() -> None:
    program = torch.export.export(Tiny().eval(), (EXAMPLE,))
    graph = from_torch(program)
    kinds = [o.kind for o in from_onnx(to_onnx(Tiny(), EXAMPLE, fast=True)).operators]
    assert [o.kind for o in graph.operators] == kinds
    assert graph.macs == MACS
    assert graph.params == PARAMS
    assert graph.operators[2].setting("group") == 2


@pytest.mark.parametrize("code", [[3, 2, 1, 3, 4, 2], [3, 3, 3, 3, 3, 3], [1, 2, 0, 4, 3, 1]])
def test_shuffled_files_give_the_same_graph(code: list[int]) -> None:
    family = NB201((3, 8, 8), 10, channels=4, cells=1)
    candidate = family.space.decode(np.array([code], dtype=family.space.dtype))[0]
    model = onnx.load_model_from_string(
        to_onnx(family.build(candidate), torch.zeros(1, 3, 8, 8), fast=True)
    )
    graph = from_onnx(model)
    for seed in range(4):
        again = from_onnx(shuffled(model, seed))
        assert again.lines() == graph.lines()
        assert np.array_equal(again.adjacency, graph.adjacency)
        assert again.operators == graph.operators


def test_the_order_is_topological() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        n = 12
        given = [
            Operator(
                kind=str(rng.choice(["Conv", "Relu"])),
                inputs=tuple(int(a) for a in range(i) if rng.random() < 0.3) or (-1,),
            )
            for i in range(n)
        ]
        moved = rng.permutation(n)  # operator i stands at moved[i]
        mixed: list[Operator] = [given[0]] * n
        for i, o in enumerate(given):
            inputs = tuple(int(moved[a]) if a >= 0 else -1 for a in o.inputs)
            mixed[moved[i]] = Operator(o.kind, inputs=inputs)
        one, two = canonical(given), canonical(mixed)
        assert one.lines() == two.lines()
        assert not np.tril(one.adjacency).any()
        assert one.adjacency.sum() == two.adjacency.sum()
        kinds = [o.kind for o in one.operators]
        assert sorted(kinds) == sorted(o.kind for o in given)


def test_graphs_are_stacked_with_padding() -> None:
    small = canonical([Operator("Relu", inputs=(-1,))])
    graph = from_onnx(to_onnx(Tiny(), EXAMPLE, fast=True))
    both = stack([graph, small])
    assert both.vocabulary == ("", "Add", "Conv", "Gemm", "ReduceMean", "Relu", "?")
    assert both.operators[1].tolist() == [5, 0, 0, 0, 0, 0]
    assert both.macs.tolist() == [MACS, 0.0]
    known = stack([graph], ("", "Conv", "?"))
    assert known.operators[0].tolist() == [1, 2, 1, 2, 2, 2]
    assert len(both.take([1])) == 1


def test_a_graph_survives_json() -> None:
    graph = from_onnx(to_onnx(Tiny(), EXAMPLE, fast=True))
    again = OpGraph.from_json(json.loads(json.dumps(graph.to_json())))
    assert again == graph
    assert again.lines() == graph.lines()


def test_what_it_refuses() -> None:
    with pytest.raises(DataError, match="no ONNX model"):
        from_onnx(b"not a model")
    with pytest.raises(DataError, match="circle"):
        canonical([Operator("Add", inputs=(1,)), Operator("Relu", inputs=(0,))])
    with pytest.raises(DataError, match="at least one"):
        stack([])
