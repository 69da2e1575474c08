"""The families of published benchmarks: their networks are the tables', their graphs the cells'."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from espalier import costs, nets
from espalier.bench import tables
from espalier.bench.tables import nb_macro
from espalier.errors import SpaceError
from espalier.nets.macro import NBMacro
from espalier.nets.nb201 import EDGES, NB201, OPERATORS, SPACE
from espalier.testing import check_family

pytestmark = pytest.mark.usefixtures("few_drawn")


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
    count = 24 if dataset == "cifar10" else 8  # they differ in the head alone
    rows = np.random.default_rng(classes).choice(len(table), count, replace=False)
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


# --- NAS-Bench-Macro -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 9, 7)], ids=str)
def test_nb_macro_conforms(shape: tuple[int, ...]) -> None:
    check_family(NBMacro(shape, 7), seed=3)


@pytest.mark.data
def test_nb_macro_networks_have_the_parameters_and_macs_of_the_table(real_data: object) -> None:
    table = tables.load("nb_macro")
    family = NBMacro()
    rows = np.random.default_rng(0).choice(len(table), 16, replace=False)
    for at, candidate in zip(rows, table.space.decode(table.codes[rows]), strict=True):
        found = costs.count(family.build(candidate), family.example())
        assert found.params == table.columns["params"][at]
        assert found.macs == table.columns["macs"][at]
    # and by the formula that the features use, all of them
    params, macs = nb_macro.sizes_of(table.codes)
    assert (params == table.columns["params"]).all()
    assert (macs == table.columns["macs"]).all()


def test_nb_macro_halves_the_image_at_the_start_of_each_stage() -> None:
    family = NBMacro()
    kinds = ("mb3_k3", "identity", "identity", "mb6_k5", "identity", "mb6_k5", "mb3_k3", "identity")
    chosen = {f"layer{i}": kind for i, kind in enumerate(kinds)}
    network = family.build(family.space.candidate(chosen)).eval()
    seen = {}
    for name, layer in network.named_modules():
        layer.register_forward_hook(lambda m, i, o, name=name: seen.__setitem__(name, o.shape[1:]))
    with torch.no_grad():
        network(family.example())
    assert seen["stem.relu"] == (32, 32, 32)
    assert seen["layer0.filter.conv"] == (96, 16, 16)
    assert seen["layer0.project.norm"] == (64, 16, 16)
    assert seen["layer2.norm"] == (128, 8, 8)  # a convolution where identity can't be
    assert seen["layer3.filter.conv"] == (768, 8, 8)
    assert seen["layer5.project.norm"] == (256, 4, 4)
    assert not any(name.startswith(("layer1", "layer4", "layer7")) for name in seen)


def test_nb_macro_graphs_are_chains() -> None:
    family = NBMacro()
    codes = np.zeros((1, 8), dtype=family.space.dtype)
    codes[0, 3] = 2
    found = family.graphs(codes)
    names = [found.vocabulary[i] for i in found.operators[0]]
    assert names == ["input", "stem", "reduce", "identity", "reduce", "mb6_k5", "identity",
                     "reduce", "identity", "identity", "output"]  # fmt: skip
    assert np.argwhere(found.adjacency[0]).tolist() == [[i, i + 1] for i in range(10)]


def test_both_are_found_by_name() -> None:
    assert set(nets.BENCHMARKS) == {"nb201", "nb_macro"}
    assert not set(nets.BENCHMARKS) & set(nets.FAMILIES)
    made = nets.make("nb201", (3, 16, 16), 10, cells=1)
    assert isinstance(made, nets.NB201)
    assert isinstance(nets.make("nb_macro", (3, 16, 16), 10), nets.NBMacro)
    with pytest.raises(SpaceError, match="Did you mean 'nb201'"):
        nets.make("nb_201", (3, 16, 16), 10)
