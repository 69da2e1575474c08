"""The families of published benchmarks: their networks are the tables', their graphs the cells'."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from espalier import costs
from espalier.bench import tables
from espalier.errors import SpaceError
from espalier.nets.nb201 import EDGES, NB201, OPERATORS, SPACE
from espalier.testing import check_family


def row(**operators: str) -> np.ndarray:
    """The codes of a cell; edges that are not named are "none"."""
    return SPACE.encode([{name: operators.get(name, "none") for name in SPACE.names}])


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 9, 7)], ids=str)
def test_nb201_conforms(shape: tuple[int, ...]) -> None:
    check_family(NB201(shape, 7, channels=4, cells=1), seed=3)


@pytest.mark.data
@pytest.mark.parametrize(("dataset", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_nb201_networks_have_the_parameters_and_macs_of_the_table(
    dataset: str, classes: int, real_data: object
) -> None:
    table = tables.load(f"nb201:dataset={dataset}")
    family = NB201(classes=classes)
    rows = np.random.default_rng(classes).choice(len(table), 60, replace=False)
    for at, candidate in zip(rows, table.space.decode(table.codes[rows]), strict=True):
        found = costs.count(family.build(candidate), family.example())
        assert found.params == table.columns["params"][at]
        assert found.macs == table.columns["macs"][at]


def test_nb201_counts_are_the_published_ones() -> None:
    # the cell of 3x3 convolutions only, as NAS-Bench-201 gives it: 1.531546 M and 220.11968 M
    family = NB201()
    (cell,) = SPACE.decode(row(**dict.fromkeys(SPACE.names, "nor_conv_3x3")))
    found = costs.count(family.build(cell), family.example())
    assert (found.params, found.macs) == (1_531_546, 220_119_680)


def test_a_cell_computes_the_sum_of_its_edges() -> None:
    torch.manual_seed(0)
    family = NB201((3, 8, 8), 5, channels=4, cells=1)
    codes = row(op_1_0="nor_conv_1x1", op_2_1="avg_pool_3x3", op_3_0="skip_connect",
                op_3_2="nor_conv_3x3", op_2_0="skip_connect")  # fmt: skip
    network = family.build(*SPACE.decode(codes)).eval()
    seen = {}
    for name, layer in network.named_modules():
        layer.register_forward_hook(lambda m, i, o, name=name: seen.__setitem__(name, (i[0], o)))
    with torch.no_grad():
        network(torch.randn(2, 3, 8, 8))
    entry, out = seen["stem.norm"][1], seen["reduce1.first.relu"][0]
    one = seen["stage1.0.op_1_0.norm"][1]
    two = entry + torch.nn.functional.avg_pool2d(one, 3, 1, 1, count_include_pad=False)
    assert torch.allclose(seen["stage1.0.op_3_2.relu"][0], two)
    assert torch.allclose(out, entry + seen["stage1.0.op_3_2.norm"][1])


def test_graphs_lose_what_carries_no_signal() -> None:
    family = NB201()
    codes = row(op_1_0="nor_conv_3x3", op_2_0="skip_connect", op_3_2="avg_pool_3x3")
    found = family.graphs(codes)
    names = [found.vocabulary[i] for i in found.operators[0]]
    # op_1_0 feeds a node that nothing reads
    assert names == ["input", "", "skip_connect", "", "", "", "avg_pool_3x3", "output"]
    assert np.argwhere(found.adjacency[0]).tolist() == [[0, 2], [2, 6], [6, 7]]
    whole = family.graphs(codes, prune=False)
    assert whole.vocabulary[whole.operators[0, 3]] == "none"
    assert whole.adjacency[0].sum() == 3 + 4 + 3  # from the input, between edges, to the output


def test_pruning_agrees_with_a_walk_over_every_path() -> None:
    codes = SPACE.sample(300, np.random.default_rng(0))
    paths = [[(3, 0)], [(1, 0), (3, 1)], [(2, 0), (3, 2)], [(1, 0), (2, 1), (3, 2)]]
    graphs = NB201().graphs(codes)
    for cell, operators in zip(codes, graphs.operators, strict=True):
        used = {
            EDGES.index(edge)
            for path in paths
            if all(OPERATORS[cell[EDGES.index(e)]] != "none" for e in path)
            for edge in path
        }
        assert set(np.flatnonzero(operators[1:-1])) == used
    assert not np.tril(graphs.adjacency[0]).any()


def test_a_wrong_size_is_refused() -> None:
    with pytest.raises(SpaceError, match="cells from 1, got"):
        NB201(cells=0)
    with pytest.raises(SpaceError, match="shape"):
        NB201((3, 32))
