"""The search on the supernets that ship, at tiny sizes on digits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from espalier import space as sp
from espalier import tasks
from espalier.errors import SpaceError
from espalier.nets import elastic
from espalier.nets.darts_cells import DARTSCells
from espalier.nets.multipath import MultiPath
from espalier.nets.nb201_supernet import NB201Supernet
from espalier.nets.superkernel import Superkernel
from espalier.nets.supernet import Supernet
from espalier.solvers.relax import (
    BinaryGates,
    EdgeNormalised,
    ExpectedCost,
    Gumbel,
    Magnitude,
    Moment,
    Perturbation,
    Rarts,
    Sampled,
    SelectionState,
    Settings,
    SingleLevel,
    Term,
    Thresholds,
    expected_cost,
    relax,
)

SHAPE = (1, 8, 8)
QUICK = Settings(epochs=2, batch=32, lr=0.05, arch_lr=0.05, precision="fp32")


@pytest.fixture(scope="module")
def digits():
    return tasks.images("digits", train=128, validation=64)


def cells(partial: int = 1) -> NB201Supernet:
    torch.manual_seed(0)
    return NB201Supernet(SHAPE, 10, channels=4, cells=1, partial=partial, affine=False)


def price(module, shape):
    return float(sum(p.numel() for p in module.parameters()))


@pytest.mark.parametrize(
    ("partial", "slots"),
    [
        (1, {}),
        (1, {"relaxation": Gumbel(5.0, hard=True)}),
        (1, {"relaxation": BinaryGates()}),
        (1, {"rule": Rarts(in_turn=False)}),
        (2, {"relaxation": EdgeNormalised()}),
    ],
    ids=["darts", "gdas", "proxyless", "rarts", "pc-darts"],
)
def test_cells_are_searched(digits, partial, slots):
    net = cells(partial)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    found = relax(net, digits, settings=QUICK, **slots)
    assert set(found.candidate) == set(net.space.names) == set(found.probabilities)
    rows = found.history
    for name in net.space.names:  # every edge has learned
        assert rows[0]["probabilities"][name] != rows[1]["probabilities"][name]
    assert any(not torch.equal(before[name], p) for name, p in net.named_parameters())
    assert net.stem[0].weight.is_contiguous(memory_format=torch.channels_last)
    likeliest = [net.space[n].options[max(range(5), key=p.__getitem__)] for n, p in _items(found)]
    without = sum(option in ("none", "skip_connect", "avg_pool_3x3") for option in likeliest)
    assert rows[-1]["parameterless"] == without


def _items(found):
    return list(found.probabilities.items())


def test_a_selection_scores_one_hot_mixtures_as_candidates(digits):
    seen = {}

    def select(state: SelectionState):
        candidate = state.supernet.space.candidate(
            dict.fromkeys(state.supernet.space.names, "nor_conv_1x1")
        )
        hot = {name: state.one_hot(name, 2) for name in state.names}
        before = {n: b.clone() for n, b in state.supernet.named_buffers()}
        seen["mixed"], seen["plain"] = state.evaluate(hot), state.evaluate(candidate)
        assert all(torch.equal(before[n], b) for n, b in state.supernet.named_buffers())
        seen["few"] = state.evaluate(candidate, images=10)
        weights = state.supernet.stem[0].weight
        old = weights.detach().clone()
        state.tune(hot, 2, lr=0.05)
        assert not torch.equal(old, weights)
        seen["tuned"] = state.evaluate(hot)
        return candidate

    found = relax(cells(), digits, settings=QUICK, selection=select)
    assert seen["mixed"] == seen["plain"]
    assert seen["few"] * 10 == pytest.approx(round(seen["few"] * 10))
    assert seen["tuned"] >= seen["mixed"]
    assert found.monitor["derived_accuracy"] == seen["tuned"]


def test_the_edges_of_darts_cells_are_the_strongest(digits):
    torch.manual_seed(0)
    net = DARTSCells(SHAPE, 10, channels=4, cells=3, nodes=2, partial=2)
    settings = Settings(epochs=1, batch=64, arch_lr=0.1, precision="fp32")
    seen = {}

    def select(state: SelectionState):
        seen["strengths"] = state.strengths
        return Magnitude()(state)

    found = relax(net, digits, relaxation=EdgeNormalised(), settings=settings, selection=select)
    assert set(found.probabilities) == {n for n in net.space.names if not n.endswith("inputs")}
    for kind in ("normal", "reduce"):
        edges = [f"{kind}.op_3_{origin}" for origin in range(3)]
        strong = [max(found.probabilities[e]) * float(seen["strengths"][e]) for e in edges]
        assert sum(float(seen["strengths"][e]) for e in edges) == pytest.approx(1.0)
        weakest = strong.index(min(strong))
        assert edges[weakest] not in found.candidate
        assert set(edges) - {edges[weakest]} <= set(found.candidate)


def test_cells_of_darts_are_decided_by_perturbation(digits):
    torch.manual_seed(0)
    net = DARTSCells(SHAPE, 10, channels=2, cells=3, nodes=2)
    chosen = Perturbation(0)
    settings = Settings(epochs=1, batch=64, arch_lr=0.1, precision="fp32")
    names = [n for n in net.space.names if n.startswith("normal.op_")]
    found = relax(net, digits, settings=settings, selection=chosen, names=names)
    decided = [row["decision"] for row in chosen.log]
    assert decided[-1:] == [n for n in decided if n.endswith("inputs")]  # the edges come last
    for row in chosen.log:
        options = net.space[row["decision"]].options
        assert row["chosen"] == options[row["left"].index(min(row["left"]))]
        assert found.candidate.get(row["decision"], row["chosen"]) == row["chosen"]
    assert net.space.valid(net.space.encode([found.candidate]))[0]


def test_sampled_candidates_run_without_the_edges_that_they_have_not(digits):
    torch.manual_seed(0)
    net = DARTSCells(SHAPE, 10, channels=4, cells=3, nodes=2)
    settings = Settings(epochs=1, batch=64, precision="fp32")
    picked, ran = Sampled(n=1, epochs=1), set()

    def select(state: SelectionState):
        for cell in net.cells:
            for node in (2, 3):
                for origin in range(node):
                    edge = f"{cell.kind}.op_{node}_{origin}"
                    module = cell.get_submodule(f"node{node}.{origin}")
                    module.register_forward_pre_hook(lambda *_, edge=edge: ran.add(edge))
        return picked(state)

    found = relax(net, digits, selection=select, settings=settings)
    assert ran == {name for name in found.candidate if not name.endswith("inputs")}


def test_multipath_blocks_are_searched_under_an_expected_cost(digits):
    torch.manual_seed(0)
    net = MultiPath(SHAPE, 10, kernels=(3,), expansions=(1, 2))
    expected = expected_cost(net, price)
    start = float(expected({n: torch.full((net.space[n].count,), 0.5) for n in net.mixable}))
    term = ExpectedCost(expected, target=start, coefficient=50.0, name="params")
    settings = Settings(epochs=1, batch=32, arch_lr=0.3, precision="fp32")
    found = relax(net, digits, relaxation=BinaryGates(), terms=[term], settings=settings)
    assert found.history[0]["terms"]["params"] > 0
    assert expected.at(found.candidate) < expected.at(net.uniform(1.0))


@pytest.mark.parametrize("in_turn", [True, False])
def test_terms_of_a_search_with_two_copies_are_told_of_its_last_epoch(digits, in_turn):
    torch.manual_seed(0)
    net = MultiPath(SHAPE, 10, kernels=(3,), expansions=(1, 2), depth=1)
    told = []

    class Counts(Term):
        name = "counts"

        def __call__(self, moment, state):
            told.append(moment.epoch)
            return torch.tensor(float(moment.epoch))

    found = relax(net, digits, rule=Rarts(in_turn=in_turn), terms=[Counts()], settings=QUICK)
    assert [row["terms"]["counts"] for row in found.history] == [0.0, 1.0]
    assert told == [0, 0, 1, 1]  # once a step


def test_an_expected_cost_knows_what_is_not_relaxed(digits):
    torch.manual_seed(0)
    net = DARTSCells(SHAPE, 10, channels=4, cells=3, nodes=2)
    expected = expected_cost(net, price)
    assert "normal.node3.inputs" in expected.names
    term = ExpectedCost(expected, name="params")
    settings = Settings(epochs=1, batch=64, arch_lr=1e-9, precision="fp32")
    found = relax(net, digits, terms=[term], settings=settings)
    even = {n: torch.full((net.space[n].count,), 1 / net.space[n].count) for n in expected.names}
    assert found.history[0]["terms"]["params"] == pytest.approx(float(expected(even)), rel=1e-2)

    net = MultiPath(SHAPE, 10, kernels=(3,), expansions=(1, 4), depth=1)
    expected, first = expected_cost(net, price), net.mixable[0]
    net.activate(net.uniform(0.0))  # the others stay there
    settings = Settings(epochs=1, batch=64, arch_lr=1e-9, precision="fp32")
    found = relax(net, digits, terms=[ExpectedCost(expected)], names=[first], settings=settings)
    ends = [expected.at({**net.uniform(0.0), first: o}) for o in net.space[first].options]
    told = found.history[0]["terms"]["cost"]
    assert told == pytest.approx(sum(ends) / len(ends), rel=1e-2)


class Bent(nn.Module):
    def forward(self, x):
        return torch.tanh(x)


class Three(Supernet):
    """Two choices in a row, smooth all through."""

    def __init__(self):
        super().__init__((1, 4, 4), 3)
        for name in ("first", "second"):
            made = {"skip": nn.Identity(), "bend": Bent(), "conv": nn.Conv2d(1, 1, 3, padding=1)}
            setattr(self, name, elastic.OneOf(sp.choice(name, *made), made))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


@pytest.mark.parametrize("seed", range(3))
def test_gates_in_a_network_have_the_slopes_of_its_loss(seed):
    """Against finite differences of the loss by each gate, with both options of a pair running."""
    torch.manual_seed(0)
    net = Three().double()
    x, y = torch.randn(8, 1, 4, 4, dtype=torch.float64), torch.arange(8) % 3
    relaxation = BinaryGates()
    logits = relaxation.start(net, net.mixable, torch.Generator().manual_seed(0))
    for logit in logits.values():
        logit.data = logit.data.double()
    now = Moment("architecture", 0, 0.0, torch.Generator().manual_seed(seed))
    gates = relaxation.weights(logits, now)

    def loss(weights):
        net.mix(weights)
        return nn.functional.cross_entropy(net(x), y)

    loss(gates).backward(inputs=list(logits.values()))
    for name, gate in gates.items():
        pair = [int(gate.weights.argmax()), *gate.idle]
        slopes = []
        for index in pair:
            ends = []
            for step in (1e-5, -1e-5):
                moved = {n: g.weights.detach().clone() for n, g in gates.items()}
                moved[name][index] += step
                ends.append(float(loss(moved).detach()))
            slopes.append((ends[0] - ends[1]) / 2e-5)
        p = torch.softmax(logits[name].detach()[pair], 0).tolist()
        wanted = torch.zeros(3, dtype=torch.float64)
        wanted[pair[0]] = p[0] * p[1] * (slopes[0] - slopes[1])
        wanted[pair[1]] = -wanted[pair[0]]
        assert torch.allclose(logits[name].grad, wanted, atol=1e-8)
        assert float(wanted.abs().max()) > 1e-6


def test_a_superkernel_learns_its_thresholds(digits, tmp_path):
    torch.manual_seed(0)
    torch.manual_seed(0)
    net = Superkernel(SHAPE, 10)
    before = {name: p.detach().clone() for name, p in net.architecture_parameters().items()}
    settings = Settings(epochs=1, batch=32, arch_lr=0.05, arch_decay=0.0, precision="fp32")
    found = relax(net, digits, relaxation=Thresholds(), rule=SingleLevel(), settings=settings)
    moved = net.architecture_parameters()
    assert any(float(moved[name].detach()) != float(old) for name, old in before.items())
    assert found.candidate == net.chosen()

    # the thresholds are part of the supernet: a run that is killed takes them up again
    class Killed(Exception):
        pass

    def kill(done, of, text):
        raise Killed

    slots = {"relaxation": Thresholds(), "rule": SingleLevel(), "settings": settings}
    torch.manual_seed(0)
    torn = Superkernel(SHAPE, 10)
    path = tmp_path / "search.safetensors"
    with pytest.raises(Killed):
        relax(torn, digits, **slots, checkpoint=path, progress=kill)
    torch.manual_seed(9)
    again = Superkernel(SHAPE, 10)
    assert relax(again, digits, **slots, checkpoint=path).candidate == found.candidate
    for name, old in net.architecture_parameters().items():
        assert torch.equal(again.architecture_parameters()[name], old)
    with pytest.raises(SpaceError, match="thresholds"):
        relax(net, digits, relaxation=Thresholds(), rule=Rarts(), settings=settings)
