"""Supernets of cells: they compute what torch's layers with the same weights compute."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.errors import SpaceError
from espalier.nets.darts_cells import DARTSCells
from espalier.nets.darts_nodes import OPERATORS as DARTS_OPERATORS
from espalier.nets.darts_nodes import HalfStep
from espalier.nets.elastic.mixing import Gates
from espalier.nets.fan import Fan, pooled
from espalier.nets.nb201 import EDGES, NB201, OPERATORS, SPACE, _operator
from espalier.nets.nb201_supernet import NB201Supernet
from espalier.testing import check_family
from espalier.testing.family import one_hot as choices
from espalier.testing.family import (
    sampled,
)
from espalier.train.precision import autocast

pytestmark = pytest.mark.usefixtures("few_drawn")


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    a, b = a.detach(), b.detach()
    if a.shape != b.shape or not b.numel():
        return a.shape == b.shape
    return float((a - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("size", [(5, 7), (1, 6), (2, 1), (1, 1)], ids=str)
def test_pooling_is_torchs(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    ours, torchs = pooled(x), F.avg_pool2d(x, 3, 1, 1, False, False)
    assert torch.allclose(ours, torchs)
    pull = torch.randn_like(ours)
    one, other = (torch.autograd.grad(out, x, pull)[0] for out in (ours, torchs))
    assert torch.allclose(one, other)


# --- a fan against torch's layers ----------------------------------------------------------------


def layers(fan: Fan) -> nn.ModuleList:
    """The operators of all edges as separate modules of torch, with copies of the weights."""
    out = nn.ModuleList()
    for edge in range(fan.edges):
        made = nn.ModuleList()
        for name in OPERATORS[1:]:
            module = nn.Sequential(OrderedDict(_operator(name, fan.channels)))
            module.load_state_dict(
                {k: fan.tensor(edge, name, *k.split(".")) for k in module.state_dict()}
            )
            made.append(module)
        out.append(made)
    return out


def naive(operators: nn.ModuleList, x: Tensor, weights: Tensor) -> list[Tensor]:
    """Weighted sums of the operators; `weights` as a fan takes them."""
    wide = weights if weights.dim() == 3 else weights[:, None].expand(-1, len(x), -1)
    return [
        sum(w[:, i + 1, None, None, None] * module(x) for i, module in enumerate(made))
        for made, w in zip(operators, wide, strict=True)
    ]


def ready(fan: Fan) -> Fan:
    """Norms with parameters and statistics of their own on each channel."""
    for module in fan.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor, 1.0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return fan


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "running",
    [
        [range(5)] * 3,
        [(0, 2, 3), (3,), (1, 3)],  # 1x1 on one edge, 3x3 on all
        [(3, 4), (1,), (2, 3, 4)],  # 3x3 on the first and the last
        [(4,), (), (1, 4)],
        [(3,), (1,), (2,)],
    ],
    ids=str,
)
@pytest.mark.parametrize("samples", [None, 4])
def test_a_fan_is_the_weighted_sum_of_its_operators(running, training, samples) -> None:
    torch.manual_seed(0)
    fan = ready(Fan(3, 4)).train(training)
    operators = layers(fan).train(training)
    x = torch.randn(4, 4, 5, 6, requires_grad=True)
    weights = torch.rand(3, *(() if samples is None else (samples,)), 5)
    for edge, on in enumerate(running):
        weights[edge][..., [i for i in range(5) if i not in on]] = 0
    weights.requires_grad_()
    kept = [[i for i in on if i] for on in running]
    found = fan(x, kept, weights)
    wanted = naive(operators, x, weights)
    pulls = [torch.randn_like(out) for out in wanted]
    for out, want, on in zip(found, wanted, kept, strict=True):
        assert (out is None) == (not on)
        assert out is None or close(out, want)
    one = sum((out * pull).sum() for out, pull in zip(found, pulls, strict=True) if out is not None)
    other = sum((out * pull).sum() for out, pull in zip(wanted, pulls, strict=True))
    one.backward()
    of_x, of_weights = x.grad.clone(), weights.grad.clone()
    x.grad = weights.grad = None
    other.backward()
    assert close(of_x, x.grad)
    for edge, on in enumerate(kept):  # an option that did not run has no gradient
        assert close(of_weights[edge][..., on], weights.grad[edge][..., on]), edge
        for index in on:
            for name, parameter in operators[edge][index - 1].named_parameters():
                held = {k: p.grad for k, p in fan.named_parameters() if p.grad is not None}
                prefix = "full" if OPERATORS[index] == "nor_conv_3x3" else "point"
                layer, _, what = name.partition(".")
                key = f"{prefix}{'' if layer == 'conv' else '_norm'}.{what}"
                rows = slice(edge * fan.channels, (edge + 1) * fan.channels)
                assert close(held[key][rows], parameter.grad), (edge, name)
            for name, buffer in operators[edge][index - 1].named_buffers():
                if training and "running" in name:
                    mine = fan.tensor(edge, OPERATORS[index], *name.split("."))
                    assert close(mine, buffer), (edge, name)


# --- the supernet --------------------------------------------------------------------------------


def small(**options: object) -> NB201Supernet:
    torch.manual_seed(0)
    return NB201Supernet((3, 8, 8), 5, **{"channels": 4, "cells": 1, **options})


def test_the_nb201_supernet_conforms() -> None:
    check_family(NB201Supernet((1, 9, 7), 7, channels=4, cells=1), seed=3)


def test_its_space_and_networks_are_those_of_the_benchmark() -> None:
    net, family = small(), NB201((3, 8, 8), 5, channels=4, cells=1)
    assert net.space == SPACE
    for candidate in SPACE.decode(SPACE.sample(4, np.random.default_rng(0))):
        wanted = {k: v.shape for k, v in family.build(candidate).state_dict().items()}
        for made in (net.extract(candidate), net.build(candidate)):
            assert {k: v.shape for k, v in made.state_dict().items()} == wanted
    assert {name for names in net.joins.values() for name in names} == set(SPACE.names)


def one_hot(candidate, grad: bool = False) -> dict[str, Tensor]:
    return {
        name: F.one_hot(torch.tensor(OPERATORS.index(candidate[name])), 5)
        .float()
        .requires_grad_(grad)
        for name in SPACE.names
    }


@pytest.mark.parametrize(("training", "affine"), [(True, True), (False, True), (True, False)])
def test_one_hot_weights_compute_what_is_extracted(training: bool, affine: bool) -> None:
    net = small(affine=affine).train(training)
    x = torch.randn(8, 3, 8, 8)
    for candidate in SPACE.decode(SPACE.sample(5, np.random.default_rng(1))):
        network = net.extract(candidate)
        net.activate(candidate)
        with torch.no_grad():
            wanted, active = network(x), net(x)
            net.mix(one_hot(candidate))
            mixed = net(x)
            net.mix(one_hot(candidate, grad=True))
            learning = net(x)
        for found in (active, mixed, learning):
            assert close(found, wanted), candidate


def mixture(seed: int, *shape: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(*shape, 5, generator=generator).softmax(-1).requires_grad_()
        for name in SPACE.names
    }


def reference(net: NB201Supernet, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """The network of mixtures, with torch's layers one by one."""
    x = net.stem(x)
    for stage in (1, 2, 3):
        x = getattr(net, f"reduce{stage - 1}")(x) if stage > 1 else x
        for cell in getattr(net, f"stage{stage}"):
            made = [layers(fan).train(net.training) for fan in cell.fans]
            nodes = [x]
            for node in (1, 2, 3):
                total = torch.zeros_like(x)
                for origin in range(node):
                    edge = weights[f"op_{node}_{origin}"]
                    value, k = nodes[origin], net.partial
                    part = value.shape[1] // k
                    (out,) = naive(
                        made[origin][node - origin - 1 : node - origin], value[:, :part], edge[None]
                    )
                    rest = value[:, part:] * edge.sum(-1).reshape(-1, 1, 1, 1)
                    total = total + torch.cat([out, rest], 1)
                if k > 1:  # channel shuffle: in of channel g * part + j goes to j * k + g
                    shuffled = torch.empty_like(total)
                    for group in range(k):
                        shuffled[:, group::k] = total[:, group * part : (group + 1) * part]
                    total = shuffled
                nodes.append(total)
            x = nodes[-1]
    return net.head(x)


@pytest.mark.parametrize("shape", [(), (6,)], ids=["shared", "a sample"])
@pytest.mark.parametrize("partial", [1, 2])
def test_a_mixture_is_the_network_of_weighted_sums(shape: tuple[int, ...], partial: int) -> None:
    net, x = small(partial=partial), torch.randn(6, 3, 8, 8)
    weights = mixture(0, *shape)
    wanted = reference(net, x, weights)
    expected = torch.autograd.grad(wanted.square().sum(), list(weights.values()))
    net.mix(weights)
    found = net(x)
    assert close(found, wanted)
    gradients = torch.autograd.grad(found.square().sum(), list(weights.values()))
    for one, other in zip(gradients, expected, strict=True):
        assert close(one, other, 1e-4)
    net.activate(SPACE.decode(SPACE.corner(last=False))[0])
    net.mix({"op_3_0": weights["op_3_0"]})  # the others stay settled, on "none"
    hard = {n: weights[n] if n == "op_3_0" else torch.eye(5)[0] for n in SPACE.names}
    hard = {n: w if n == "op_3_0" else w.expand(*shape, 5) for n, w in hard.items()}
    assert close(net(x), reference(net, x, hard))


def test_gates_get_the_gradients_of_options_that_did_not_run() -> None:
    net, x = small().eval(), torch.randn(4, 3, 8, 8)
    soft = {name: torch.eye(5)[3].requires_grad_() for name in SPACE.names}
    reference(net, x, soft).square().sum().backward()
    for idle in range(5):
        if idle == 3:
            continue
        hard = {name: torch.eye(5)[3].requires_grad_() for name in SPACE.names}
        net.mix({name: Gates(w, (idle,)) for name, w in hard.items()})
        net(x).square().sum().backward()
        for name in SPACE.names:
            wanted = 0 if idle == 0 else soft[name].grad[idle]
            assert float(hard[name].grad[idle]) == pytest.approx(float(wanted), rel=1e-3, abs=1e-3)


def test_gates_of_an_edge_whose_source_nothing_else_reads() -> None:
    """Finite differences of the loss by each gate, on edges of which "none" runs."""
    net, x = small().double().eval(), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    runs = {"op_1_0": 3, "op_2_0": 2, "op_3_0": 1}  # the others run "none"
    hard = {n: torch.eye(5, dtype=torch.float64)[runs.get(n, 0)] for n in SPACE.names}
    for idle in (1, 2, 3, 4):
        given = {n: w.clone().requires_grad_() for n, w in hard.items()}
        net.mix({n: w if n in runs else Gates(w, (idle,)) for n, w in given.items()})
        net(x).square().sum().backward()
        for name in ("op_3_1", "op_3_2", "op_2_1"):
            ends = []
            for step in (1e-5, -1e-5):
                moved = hard[name].clone()
                moved[idle] = step
                net.mix({**hard, name: moved})
                with torch.no_grad():
                    ends.append(net(x).square().sum())
            slope = float(ends[0] - ends[1]) / 2e-5
            assert float(given[name].grad[idle]) == pytest.approx(slope, rel=1e-4, abs=1e-6)
            assert (slope == 0) == (name == "op_2_1")  # it leads to nothing that runs


def test_channels_that_pass_carry_a_node_that_no_operator_reads() -> None:
    net, x = small(partial=2), torch.randn(4, 3, 8, 8)
    runs = {"op_1_0": 3, "op_2_0": 2, "op_3_0": 1}
    hard = {n: torch.eye(5)[runs.get(n, 0)] for n in SPACE.names}
    wanted = reference(net, x, hard)
    net.mix(hard)
    assert close(net(x), wanted)
    net.activate(SPACE.candidate({n: OPERATORS[runs.get(n, 0)] for n in SPACE.names}))
    assert close(net(x), wanted)


def test_edges_that_feed_nothing_are_not_run() -> None:
    net = small()
    chosen = dict.fromkeys(SPACE.names, "nor_conv_3x3") | {"op_2_1": "none", "op_3_1": "none"}
    net.activate(SPACE.candidate(chosen))
    net(torch.randn(4, 3, 8, 8)).sum().backward()
    weight = net.stage1[0].fans[0].full.weight
    touched = [bool(part.any()) for part in weight.grad.chunk(3)]
    assert touched == [False, True, True]
    assert net.stage1[0].fans[1].full.weight.grad is None


def test_bf16_learns_as_fp32_does() -> None:
    net, x, weights = small(), torch.randn(16, 3, 8, 8), mixture(2)
    gradients = []
    for chosen in ("fp32", "bf16"):
        net.mix(weights)
        with autocast(chosen):
            loss = net(x).float().logsumexp(1).sum()
        found = torch.autograd.grad(loss, [net.stage2[0].fans[0].full.weight, *weights.values()])
        gradients.append(torch.cat([g.flatten() for g in found]))
    assert F.cosine_similarity(*gradients, dim=0) > 0.9


def test_partial_channels_give_no_network() -> None:
    net = small(partial=2)
    candidate = SPACE.decode(SPACE.corner(last=True))[0]
    for refused in (net.extract, net.build):
        with pytest.raises(SpaceError, match="nb201"):
            refused(candidate)
    with pytest.raises(SpaceError, match="gates are not for partial channels"):
        net.mix({"op_1_0": Gates(torch.eye(5)[0], (2,))})
    with pytest.raises(SpaceError, match="divisor of channels"):
        small(partial=3)
    with pytest.raises(SpaceError, match="unknown unit"):
        small().unit("stage9", candidate)
    assert len(EDGES) * 3 + 4 == len(small().units())


def kept(net: NB201Supernet, x: Tensor) -> int:
    """Bytes that a forward pass keeps for backward, the parameters aside."""
    found = {}
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = (tensor, storage.nbytes())  # held, so that none is reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = net(x)
    assert out.requires_grad
    return sum(size for _, size in found.values())


def test_hard_weights_and_gates_keep_what_one_path_keeps() -> None:
    net, x = small(channels=8), torch.randn(32, 3, 8, 8)
    for operator in ("nor_conv_1x1", "nor_conv_3x3"):
        candidate = SPACE.candidate(dict.fromkeys(SPACE.names, operator))
        net.activate(candidate)
        path = kept(net, x)
        hard = one_hot(candidate, grad=True)
        net.mix(hard)
        assert kept(net, x) <= 1.02 * path
        net.mix({n: Gates(w, ((int(w.argmax()) + 1) % 5,)) for n, w in hard.items()})
        assert kept(net, x) <= 1.3 * path
    net.mix(mixture(0))
    every = kept(net, x)
    assert every > 1.5 * path
    quarter = small(channels=8, partial=4)
    quarter.mix(mixture(0))
    assert kept(quarter, x) <= 0.6 * every


# --- the space of DARTS --------------------------------------------------------------------------


def darts(**options: object) -> DARTSCells:
    torch.manual_seed(0)
    return DARTSCells((3, 8, 8), 5, **{"channels": 4, "cells": 3, "nodes": 2, **options})


def test_darts_cells_conform() -> None:
    check_family(DARTSCells((1, 8, 8), 3, channels=2, cells=3, nodes=2))
    net = DARTSCells((1, 9, 7), 5, channels=4, cells=3, nodes=2)
    for candidate in sampled(net, seed=1)[1:3]:
        net.activate(candidate)
        x = torch.randn(6, 1, 9, 7)
        with torch.no_grad():
            active = net.train()(x)
            net.mix(choices(net, candidate))
            assert close(net(x), active)


def test_darts_decisions_are_those_of_the_paper() -> None:
    net = darts(nodes=4)
    # per cell: pairs of 2, 3, 4 and 5 states, and an operator on each of two edges of four nodes
    assert net.space.size == (1 * 3 * 6 * 10 * 7**8) ** 2
    assert dict(net.space["normal.op_3_0"].when) == {"normal.node3.inputs": ("0-1", "0-2")}
    assert net.joins["reduce.4"] == tuple(f"reduce.op_4_{i}" for i in range(4))
    kinds = [cell.kind for cell in darts(cells=6).cells]
    assert kinds == ["normal", "normal", "reduce", "normal", "reduce", "normal"]


def test_a_mixture_of_operators_runs_every_edge_of_a_node() -> None:
    net = darts().eval()
    names = [n for n in net.mixable if ".op_" in n]
    weights = {n: torch.randn(7).softmax(0) for n in names}
    states = [torch.randn(2, 4, 8, 8) for _ in range(3)]
    node = net.cells[0].node3
    net.mix(weights)
    wanted = sum(
        weights[f"normal.op_3_{i}"][j] * getattr(edge, f"is_{name}")(state)
        for i, (edge, state) in enumerate(zip(node.children(), states, strict=True))
        for j, name in enumerate(DARTS_OPERATORS)
    )
    assert close(node(states), wanted)
    pairs = torch.tensor([0.2, 0.5, 0.3])  # of 0-1, 0-2, 1-2
    net.mix({**weights, "normal.node3.inputs": pairs})
    parts = [
        sum(
            weights[f"normal.op_3_{i}"][j] * getattr(edge, f"is_{name}")(state)
            for j, name in enumerate(DARTS_OPERATORS)
        )
        for i, (edge, state) in enumerate(zip(node.children(), states, strict=True))
    ]
    assert close(node(states), 0.7 * parts[0] + 0.5 * parts[1] + 0.8 * parts[2])


@pytest.mark.parametrize("stride", [1, 2])
def test_partial_edges_pass_the_other_channels(stride: int) -> None:
    net = darts(partial=2).eval()
    cell = net.cells[0 if stride == 1 else 1]
    edge, x = next(cell.node2.children()), torch.randn(2, cell.channels, 8, 8)
    name = f"{cell.kind}.op_2_0"
    weights = torch.rand(7)
    net.mix({name: weights})
    half = cell.channels // 2
    mixed = sum(
        w * getattr(edge.inner, f"is_{option}")(x[:, :half])
        for w, option in zip(weights, DARTS_OPERATORS, strict=True)
    )
    rest = x[:, half:] if stride == 1 else F.max_pool2d(x[:, half:], 2)
    rest = rest * weights.sum()
    wanted = torch.stack([mixed, rest], 2).flatten(1, 2)  # one channel of each by turns
    assert close(edge(x), wanted)
    assert net(torch.randn(2, 3, 8, 8)).shape == (2, 5)
    with pytest.raises(SpaceError, match="partial=1"):
        net.extract()


def test_a_larger_network_of_a_candidate_is_built() -> None:
    net, large = darts(), darts(cells=5, channels=6)
    candidate = net.space.decode(net.space.sample(1, np.random.default_rng(0)))[0]
    network = large.build(candidate)
    assert network(torch.randn(2, 3, 8, 8)).shape == (2, 5)
    kinds = [name.rpartition(".")[0] for name in network.state_dict() if name.startswith("cells")]
    assert {k.split(".")[1] for k in kinds} == set("01234")
    halves = HalfStep(3, 6, affine=True).eval()
    x = torch.randn(2, 3, 8, 6)
    relu = x.relu()
    wanted = torch.cat([halves.even(relu), halves.odd(relu[:, :, 1:, 1:])], 1)
    assert close(halves(x), halves.norm(wanted))
