"""Relaxations: what the weights of a mixture are, and which gradient reaches the logits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from espalier import space as sp
from espalier.errors import SpaceError
from espalier.nets.elastic import Gates
from espalier.solvers.relax import (
    BinaryGates,
    EdgeNormalised,
    Gumbel,
    MaxWeight,
    Moment,
    Softmax,
    Thresholds,
)
from espalier.train.schedules import linear


class Bare(nn.Module):
    """As much of a supernet as a relaxation asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.space = sp.Space([sp.choice(n, "x", "y", "z") for n in ("a", "b", "c")])
        self.joins = {"1": ("a",), "2": ("b", "c")}

    def mix(self, weights: dict[str, Gates]) -> None:
        if "c" in weights:
            raise SpaceError("c is a size")


def moment(phase: str, seed: int = 0, progress: float = 0.0) -> Moment:
    chance = None if phase == "evaluate" else torch.Generator().manual_seed(seed)
    return Moment(phase, 0, progress, chance)


def logits(**values: list[float]) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.tensor(v)) for name, v in values.items()}


def softmax(values: list[float]) -> list[float]:
    powers = [math.exp(v) for v in values]
    return [p / sum(powers) for p in powers]


def test_first_logits_are_small_and_drawn_by_the_generator():
    started = Softmax().start(Bare(), ("a", "c"), torch.Generator().manual_seed(1))
    again = Softmax().start(Bare(), ("a", "c"), torch.Generator().manual_seed(1))
    assert list(started) == ["a", "c"]
    assert all(len(p) == 3 for p in started.values())
    assert all(torch.equal(started[n], again[n]) for n in started)
    assert 0 < max(float(p.detach().abs().max()) for p in started.values()) < 0.01


def test_softmax_at_a_temperature_that_falls():
    found = Softmax(linear(2.0, 1.0)).weights(logits(a=[1.0, 2.0, 4.0]), moment("weights"))
    assert found["a"].tolist() == pytest.approx(softmax([0.5, 1.0, 2.0]))
    last = Softmax(linear(2.0, 1.0)).weights(logits(a=[1.0, 2.0]), moment("evaluate", 0, 1.0))
    assert last["a"].tolist() == pytest.approx(softmax([1.0, 2.0]))


def test_max_weight_gives_the_likeliest_one():
    p = softmax([1.0, 3.0, 2.0])
    found = MaxWeight().weights(logits(a=[1.0, 3.0, 2.0]), moment("weights"))["a"]
    assert found.tolist() == pytest.approx([1 - p[1] + q for q in p])
    assert float(found[1].detach()) == pytest.approx(1.0)


def test_hard_gumbel_samples_by_the_probabilities():
    values = [0.0, 1.0, 2.0]
    given = logits(a=values)
    counts = torch.zeros(3)
    relaxation = Gumbel(0.7, hard=True)
    now = moment("weights")
    for _ in range(2000):
        found = relaxation.weights(given, now)["a"].detach()
        assert sorted(found.tolist()) == [0.0, 0.0, 1.0]
        counts += found
    assert torch.allclose(counts / 2000, torch.tensor(softmax(values)), atol=0.035)


def test_hard_gumbel_has_the_gradient_of_the_soft_sample():
    grads = []
    for hard in (True, False):
        given = logits(a=[0.0, 1.0, 2.0], b=[0.5, 0.1])
        found = Gumbel(0.7, hard).weights(given, moment("architecture", 3))
        loss = (found["a"] * torch.tensor([1.0, -2.0, 0.5])).sum() + found["b"][0]
        loss.backward()
        grads.append(torch.cat([p.grad for p in given.values()]))
    assert torch.allclose(*grads)
    assert float(grads[0].abs().sum()) > 0


def test_soft_gumbel_is_a_softmax_of_noisy_log_probabilities():
    found = Gumbel(0.5).weights(logits(a=[0.0, 1.0]), moment("weights", 5))["a"]
    other = Gumbel(1.0).weights(logits(a=[0.0, 1.0]), moment("weights", 5))["a"]
    # the same noise: log-odds scale with the inverse of the temperature
    assert float((found[0] / found[1]).log().detach()) == pytest.approx(
        2 * float((other[0] / other[1]).log().detach()), rel=1e-4
    )
    quiet = Gumbel(0.5).weights(logits(a=[0.0, 1.0]), moment("evaluate"))["a"]
    assert quiet.tolist() == pytest.approx(softmax([0.0, 1.0]))


def test_binary_gates_run_one_path_for_the_weights():
    counts = torch.zeros(3)
    given, now = logits(a=[0.0, 1.0, 2.0]), moment("weights")
    for _ in range(2000):
        found = BinaryGates().weights(given, now)["a"]
        assert isinstance(found, Tensor)
        assert not found.requires_grad
        counts += found
    assert torch.allclose(counts / 2000, torch.tensor(softmax([0.0, 1.0, 2.0])), atol=0.035)


def test_binary_gates_compare_two_options_by_the_published_gradient():
    values = [0.3, 1.0, -0.5, 0.7]
    given = logits(a=values)
    relaxation = BinaryGates()
    gates = relaxation.weights(given, moment("architecture", 2))["a"]
    assert isinstance(gates, Gates)
    (rests,) = gates.idle
    runs = int(gates.weights.argmax())
    assert gates.weights.tolist() == [float(i == runs) for i in range(4)]
    assert rests != runs
    slopes = torch.tensor([0.9, -0.4, 2.0, 1.1])  # of the loss for each gate
    (gates.weights * slopes).sum().backward()
    pair = (runs, rests)
    p = dict(zip(pair, softmax([values[i] for i in pair]), strict=True))
    for i in range(4):
        wanted = sum(float(slopes[k]) * p[k] * (float(i == k) - p[i]) for k in pair if i in pair)
        assert float(given["a"].grad[i]) == pytest.approx(wanted, abs=1e-6)


def test_binary_gates_leave_the_probabilities_of_the_others():
    given = logits(a=[0.3, 1.0, -0.5, 0.7], b=[0.1, 0.2, 0.3])
    relaxation = BinaryGates()
    gates = relaxation.weights(given, moment("architecture", 2))["a"]
    pair = {int(gates.weights.argmax()), *gates.idle}
    before = {name: p.detach().clone() for name, p in given.items()}
    with torch.no_grad():
        given["a"].add_(torch.tensor([0.5, -0.3, 0.2, 0.8]))  # as an optimiser with decay may
    relaxation.after_step(given, before)
    was, now = torch.softmax(before["a"], 0), torch.softmax(given["a"].detach(), 0)
    for i in range(4):
        if i in pair:
            assert float(was[i]) != pytest.approx(float(now[i]), abs=1e-3)
        else:
            assert float(was[i]) == pytest.approx(float(now[i]), abs=1e-6)
    rise = torch.tensor([0.5, -0.3, 0.2, 0.8])
    low, high = sorted(pair)
    assert float((now[high] / now[low]).log() - (was[high] / was[low]).log()) == pytest.approx(
        float(rise[high] - rise[low]), abs=1e-5
    )


def test_edges_share_the_weight_of_their_node():
    relaxation = EdgeNormalised()
    given = relaxation.start(Bare(), ("a", "b", "c"), torch.Generator().manual_seed(0))
    (node,) = set(given) - {"a", "b", "c"}  # a node with one edge has nothing to share
    with torch.no_grad():
        given[node].copy_(torch.tensor([0.0, 1.0]))
        given["c"].copy_(torch.tensor([0.0, 1.0, 2.0]))
    found = relaxation.weights(given, moment("evaluate"))
    beta = softmax([0.0, 1.0])
    assert float(found["a"].sum()) == pytest.approx(1.0)
    assert float(found["b"].sum()) == pytest.approx(beta[0])
    assert found["c"].tolist() == pytest.approx([beta[1] * p for p in softmax([0.0, 1.0, 2.0])])
    assert set(relaxation.probabilities(given)) == {"a", "b", "c"}
    assert float(relaxation.probabilities(given)["c"].sum()) == pytest.approx(1.0)
    assert {n: float(s) for n, s in relaxation.strengths(given).items()} == pytest.approx(
        {"b": beta[0], "c": beta[1]}
    )


def test_edges_keep_what_the_inner_relaxation_must_have_back():
    class Remembers(Softmax):
        seen = torch.zeros(1)

        def tensors(self):
            return {"seen": self.seen}

        def load(self, tensors):
            self.seen = tensors["seen"]

    saved = EdgeNormalised(Remembers()).tensors()
    again = EdgeNormalised(Remembers())
    again.load({"seen": saved["seen"] + 1})
    assert again.inner.seen.tolist() == [1.0]


def test_edges_of_gates_stay_gates():
    relaxation = EdgeNormalised(BinaryGates())
    given = relaxation.start(Bare(), ("b", "c"), torch.Generator().manual_seed(0))
    found = relaxation.weights(given, moment("architecture", 4))["b"]
    assert isinstance(found, Gates)
    assert float(found.weights[found.idle[0]]) == 0
    found.weights[found.idle[0]].backward()
    assert float(given["b"].grad.abs().sum()) > 0


def test_gates_of_sizes_run_both_options_with_their_shares():
    relaxation = BinaryGates()
    given = relaxation.start(Bare(), ("a", "c"), torch.Generator().manual_seed(0))
    with torch.no_grad():
        given["c"].copy_(torch.tensor([0.0, 1.0, 2.0]))
    found = relaxation.weights(given, moment("architecture", 4))
    assert isinstance(found["a"], Gates)
    assert isinstance(found["c"], Tensor)
    pair = [i for i, w in enumerate(found["c"].tolist()) if w]
    assert [float(found["c"][i].detach()) for i in pair] == pytest.approx(softmax(pair))
    assert len(pair) == 2


def test_thresholds_are_the_supernets_own():
    class Super(Bare):
        def __init__(self) -> None:
            super().__init__()
            self.level = nn.Parameter(torch.tensor(0.2))

        def architecture_parameters(self) -> list[nn.Parameter]:
            return [self.level]

        def indicators(self) -> dict[str, Tensor]:
            return {"a": torch.stack([self.level, 1 - self.level])}

    net, relaxation = Super(), Thresholds()
    given = relaxation.start(net, ("a",), torch.Generator())
    assert list(given) == ["level"]
    assert given["level"] is net.level
    found = relaxation.weights(given, moment("architecture"))
    assert found["a"].tolist() == pytest.approx([0.2, 0.8])
    assert found["a"].requires_grad
    with pytest.raises(SpaceError, match="indicators"):
        Thresholds().start(Bare(), ("a",), torch.Generator())


def test_what_can_not_be_relaxed_is_refused():
    net = Bare()
    net.space = sp.Space([sp.real("rate", 0.0, 1.0)])
    with pytest.raises(SpaceError, match="real decision"):
        Softmax().start(net, ("rate",), torch.Generator())
    alone = Bare()
    alone.joins = {}
    with pytest.raises(SpaceError, match="joins"):
        EdgeNormalised().start(alone, ("a",), torch.Generator())
