"""The expected cost: exact at one-hot probabilities, the mean of draws elsewhere, differentiable."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import espalier as esp
from espalier.costs import Counts, count
from espalier.errors import SpaceError
from espalier.nets import MobileNet
from espalier.nets.multipath import MultiPath
from espalier.solvers.relax.expected import (
    counted,
    expected_cost,
    expected_latency,
    latency_price,
)


def paths() -> MultiPath:
    return MultiPath((1, 8, 8), 4, (3, 5), (2,), (2, 1, 1), stem=8, widths=(8, 8, 16))


class Nested(esp.Supernet):
    """Blocks that an elastic depth switches off, with a width that reaches over several units."""

    def __init__(self) -> None:
        super().__init__((3, 6, 6), 5)
        width = esp.ordinal("width", 4, 8)
        kernel = [esp.ordinal(f"kernel{i}", 3, 5) for i in range(3)]
        self.stem = esp.elastic.Conv2d(3, width, 3)
        self.body = esp.elastic.Repeat(
            esp.ordinal("depth", 1, 2, 3), lambda i: esp.elastic.Conv2d(width, width, kernel[i])
        )
        self.extra = esp.elastic.Skippable(
            esp.choice("extra", False, True), esp.elastic.Conv2d(width, width, 1)
        )
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.last = esp.elastic.Linear(width, 5)


def random_probabilities(expected, seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: torch.tensor(rng.dirichlet(np.ones(len(expected.options[name]))))
        for name in expected.names
    }


def mean_over_all(net, costs, probabilities):
    """The mean over every combination of options, weighted by its probability, one by one."""
    names = list(probabilities)
    total = 0.0
    for picks in itertools.product(*(range(len(probabilities[n])) for n in names)):
        weight = np.prod([float(probabilities[n][i]) for n, i in zip(names, picks, strict=True)])
        code = np.zeros((1, len(net.space)), dtype=net.space.dtype)
        for name, i in zip(names, picks, strict=True):
            code[0, net.space.names.index(name)] = i
        row = net.space.canonical(code)
        total += weight * costs(net.space.decode(row)[0])
    return total


def mobile() -> MobileNet:
    return MobileNet((1, 8, 8), 3, stem=8, widths=[8, (8, 16), 16], depth=(1, 2), expansion=2)


@pytest.mark.parametrize(
    ("make", "what"), [(paths, "macs"), (Nested, "params"), (mobile, "macs"), (mobile, "params")]
)
def test_one_network_costs_what_is_counted_of_it(make, what):
    net = make()
    expected = expected_cost(net, counted(what), net.space.names)
    codes = net.space.sample(8, np.random.default_rng(1))
    for candidate in net.space.decode(codes):
        network = net.extract(candidate)
        assert expected.at(candidate) == getattr(count(network, net.example(1)), what)


def test_conditions_are_weighed_as_often_as_they_hold():
    net = Nested()
    expected = expected_cost(net, counted("params"), net.space.names)
    probabilities = random_probabilities(expected)
    alone = {}

    def params(candidate):
        if candidate not in alone:
            alone[candidate] = sum(p.numel() for p in net.extract(candidate).parameters())
        return alone[candidate]

    mean = mean_over_all(net, params, probabilities)
    assert float(expected(probabilities)) == pytest.approx(mean, rel=1e-9)


def test_the_mean_of_many_paths_is_the_mean_of_their_counts():
    net = paths()
    expected = expected_cost(net, counted("macs"), net.space.names, constant=7.0)
    probabilities = random_probabilities(expected, 3)
    rows = net.space.enumerate()
    macs = Counts(net).estimate_codes(rows)["macs"]
    weights = np.ones(len(rows))
    for column, name in enumerate(net.space.names):
        weights *= probabilities[name].numpy()[rows[:, column].astype(int)]
    assert float(expected(probabilities)) == pytest.approx(7.0 + float(weights @ macs), rel=1e-9)


def test_gradients_are_those_of_finite_differences():
    net = Nested()
    expected = expected_cost(net, counted("macs"), net.space.names)
    logits = {n: torch.randn(len(o), dtype=torch.float64) for n, o in expected.options.items()}

    def cost(*values):
        return expected({n: v.softmax(0) for n, v in zip(logits, values, strict=True)}).log()

    inputs = [v.requires_grad_() for v in logits.values()]
    assert torch.autograd.gradcheck(cost, inputs, eps=1e-6, atol=1e-7)


def test_decisions_that_are_not_named_stay_as_they_are():
    net = Nested()
    largest = expected_cost(net, counted("params"), ["kernel0"])
    small = net.space.candidate({"width": 4, "depth": 1, "kernel0": 3, "extra": False})
    net.activate(small)
    smallest = expected_cost(net, counted("params"), ["kernel0"])
    for expected, candidate in ((largest, net.uniform(1.0)), (smallest, small)):
        kernel = {"kernel0": candidate["kernel0"]}
        params = sum(p.numel() for p in net.extract(candidate).parameters())
        assert expected.at(kernel) == params


def test_what_cannot_be_expected_is_refused():
    net = paths()
    with pytest.raises(SpaceError, match="unknown decision 'stage1'"):
        expected_cost(net, counted("macs"), ["stage1"])
    with pytest.raises(SpaceError, match="unknown additive count 'activation_bytes'"):
        counted("activation_bytes")
    expected = expected_cost(net, counted("params"), net.space.names)
    half = random_probabilities(expected)
    with pytest.raises(
        SpaceError, match=r"'stage1.0.op' must be \(3,\), one an option, got \(2,\)"
    ):
        expected({**half, "stage1.0.op": torch.ones(2)})
    half.pop("stage2.0.op")
    with pytest.raises(SpaceError, match="needs the probabilities of 'stage2"):
        expected(half)


def test_making_it_leaves_torchs_generator_and_the_supernet_alone():
    net = paths()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.random.get_rng_state()
    expected_cost(net, counted("macs"), net.space.names)
    assert torch.equal(state, torch.random.get_rng_state())
    assert net.active is None
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_latency_comes_from_the_table_of_measured_pieces():
    """A made-up table: every piece takes its multiply-accumulates in nanoseconds."""
    net = paths()
    table = made_up_table(net)
    from espalier.costs import OnnxRuntime, PredictedLatency

    predicted = PredictedLatency.from_json(net, OnnxRuntime(), table)
    expected = expected_latency(net, predicted, net.space.names)
    codes = net.space.sample(6, np.random.default_rng(0))
    wanted = predicted.estimate_codes(codes)["latency_ms"]
    found = [expected.at(candidate) for candidate in net.space.decode(codes)]
    assert found == pytest.approx(list(wanted), rel=1e-9)
    assert len(set(found)) > 3
    # a module that the table has never met is filled in
    assert latency_price(predicted)(nn.Conv2d(8, 8, 3), (8, 8, 8)) > 0


def made_up_table(net):
    from espalier.costs import OnnxRuntime
    from espalier.costs.pieces import pieces_of
    from espalier.costs.table import Table

    pieces = pieces_of(net)
    rows = net.space.enumerate()
    met = {p.key: p for part in pieces.parts(rows) for p in part.pieces}
    entries = {
        key: {"ms": 1e-3 + piece.count.macs * 1e-6, "work": list(piece.work)}
        for key, piece in met.items()
    }
    about = OnnxRuntime().about()
    table = Table(about, net.space.fingerprint, entries, 0.0, 0.25, 1.5, "", {"overhead_ms": 0.25})
    return table.to_json()
