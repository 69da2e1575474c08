"""Terms of the loss, schedules, and the two halves of a task's training examples."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from espalier import tasks
from espalier.errors import DataError, EspalierError
from espalier.problem import Metric
from espalier.solvers.relax import Entropy, ExpectedCost, Moment, SelfDistillation, TermState
from espalier.solvers.relax.distillation import voted
from espalier.solvers.relax.monitor import sharpness
from espalier.tasks import Task, TensorTask
from espalier.train.halves import halves
from espalier.train.schedules import after, constant, cosine, cosine_power, exponential, linear

NOW = Moment("architecture", 0, 0.25)


def state(probabilities: dict[str, Tensor], loss: float = 2.0, outputs: Tensor | None = None):
    blank = torch.zeros(4, 3) if outputs is None else outputs
    return TermState(
        None,
        blank,
        blank,
        blank,
        torch.tensor(loss),
        probabilities,
        probabilities,
        lambda m, x: m(x),
    )


def price(p):
    return 10 * p["a"][0] + 30 * p["a"][1]


def test_expected_cost_reads_the_weights_that_ran_where_asked():
    told = replace(
        state({"a": torch.tensor([0.25, 0.75])}), mixture={"a": torch.tensor([1.0, 0.0])}
    )
    assert float(ExpectedCost(price, of="mixture")(NOW, told)) == 10
    assert float(ExpectedCost(price)(NOW, told)) == 25


@pytest.mark.parametrize(
    ("form", "target", "wanted"),
    [
        ("linear", None, 25.0),
        ("linear", 50.0, 0.5),
        ("log", 5.0, math.log(5)),
        ("hinge", 20.0, 0.25),
        ("hinge", 40.0, 0.0),
        ("square", 20.0, 0.0625),
    ],
)
def test_expected_cost_has_the_form_asked_for(form, target, wanted):
    logits = torch.tensor([0.0, math.log(3)], requires_grad=True)  # probabilities 1/4, 3/4
    told = state({"a": torch.softmax(logits, 0)})
    term = ExpectedCost(price, target, form, coefficient=linear(0.0, 4.0))
    assert float(term(NOW, told).detach()) == pytest.approx(wanted, rel=1e-5)
    assert float(term.added(NOW, told).detach()) == pytest.approx(
        wanted, rel=1e-5
    )  # times 4 * 0.25
    term(NOW, told).backward()
    # the dearer option loses, unless the limit is kept
    assert (float(logits.grad[1]) > 0) == (wanted > 0)
    assert ExpectedCost(price, 1.0, coefficient=0.0).added(NOW, told) is None


def test_the_product_form_multiplies_the_loss():
    told = state({"a": torch.tensor([0.25, 0.75])}, loss=2.0)
    term = ExpectedCost(price, form="product", coefficient=0.2, power=0.6)
    total = told.loss + term.added(NOW, told)
    assert float(total) == pytest.approx(2.0 * 0.2 * math.log(25.0) ** 0.6, rel=1e-5)


def test_expected_cost_refuses_what_makes_no_sense():
    with pytest.raises(EspalierError, match="linear, log, hinge, square, product"):
        ExpectedCost(price, form="cubic")
    with pytest.raises(EspalierError, match="limit"):
        ExpectedCost(price, form="hinge")
    with pytest.raises(EspalierError, match="above 0"):
        ExpectedCost(price, target=0.0)


def test_entropy_is_the_mean_over_decisions_in_nats():
    told = state({"a": torch.tensor([0.5, 0.5]), "b": torch.tensor([1.0, 0.0])})
    assert float(Entropy()(NOW, told)) == pytest.approx(math.log(2) / 2)


def test_votes_weigh_teachers_by_how_many_agree():
    p = torch.tensor([[[0.6, 0.4, 0.0]], [[0.8, 0.1, 0.1]], [[0.2, 0.3, 0.5]]])
    # two agree on the first class, one stands alone: shares 2/5, 2/5, 1/5
    wanted = [0.4 * 0.6 + 0.4 * 0.8 + 0.2 * 0.2, 0.4 * 0.4 + 0.4 * 0.1 + 0.2 * 0.3, 0.04 + 0.1]
    assert voted(p)[0].tolist() == pytest.approx(wanted)


class Net(nn.Linear):
    """A linear layer that notes the mixture it was given."""

    def mix(self, weights):
        self.mixture = weights


def test_self_distillation_is_the_divergence_from_the_vote():
    torch.manual_seed(0)
    net, term = Net(3, 4), SelfDistillation(teachers=2, coefficient=0.5)
    term.start(net)
    x = torch.randn(5, 3)
    now = replace(state({}), inputs=x, outputs=net(x))
    assert term.added(NOW, now) is None  # no teacher yet
    seen = []
    for _ in range(3):
        with torch.no_grad():
            net.weight.normal_()
        seen.append(torch.softmax(net(x), 1).detach())
        term.after_epoch(net, {"a": torch.tensor([0.3, 0.7], requires_grad=True)})
    outputs = (x @ torch.randn(3, 4)).requires_grad_()
    found = term.added(NOW, replace(now, outputs=outputs))
    q = voted(torch.stack(seen[1:]))  # the oldest is forgotten
    wanted = (q * (q.log() - torch.log_softmax(outputs, 1))).sum(1).mean()
    assert float(found.detach()) == pytest.approx(0.5 * float(wanted.detach()), rel=1e-5)
    found.backward()
    assert outputs.grad is not None
    assert all(p.grad is None for p in net.parameters())

    again = SelfDistillation(teachers=2, coefficient=0.5)
    again.start(net)
    again.load({name: t.clone() for name, t in term.tensors().items()})
    assert torch.equal(again.added(NOW, replace(now, outputs=outputs)), found)


def test_sharpness_of_a_quadratic_is_half_the_radius_squared():
    w = nn.Parameter(torch.tensor([3.0, 4.0]))

    def loss() -> Tensor:
        return 0.5 * ((w - torch.tensor([3.0, 4.0])) ** 2).sum()

    found = sharpness(loss, [w], radius=0.2, directions=3)
    assert found["mean"] == pytest.approx(0.5 * (0.2 * 5) ** 2, rel=1e-4)
    assert found["max"] == pytest.approx(found["mean"], rel=1e-4)
    assert w.tolist() == [3.0, 4.0]


def test_schedules_are_their_formulas():
    assert constant(3)(0.7) == 3
    assert linear(10, 0.1)(0.5) == pytest.approx(5.05)
    assert exponential(5, 0.956, 90)(1 / 90) == pytest.approx(5 * 0.956)
    assert cosine(0.025, 0.001)(0.25) == pytest.approx(
        0.001 + 0.024 * (1 + math.cos(math.pi / 4)) / 2
    )
    later = after(0.5, linear(1, 2))
    assert [later(p) for p in (0.0, 0.49, 0.5, 1.0)] == [0.0, 0.0, 1.0, 2.0]
    assert after(0.5, 7.0)(0.6) == 7
    assert "start=10.0" in repr(linear(10, 1))  # a checkpoint compares them by what they are
    for bad in (lambda: after(1.0, 1), lambda: exponential(1, 0, 5), lambda: cosine_power(1, 0, 0)):
        with pytest.raises(EspalierError):
            bad()


@pytest.mark.parametrize("order", [0.5, 1, 2, 10])
def test_cosine_power_annealing_is_its_closed_form(order):
    high, low, epochs = 0.2, 1e-4, 37

    def published(epoch: int) -> float:
        c = (1 + math.cos(math.pi * epoch / epochs)) / 2
        if order == 1:
            return low + (high - low) * c
        y, least, most = order ** (c + 1), order**1, order**2
        return low + (high - low) * (y - least) / (most - least)

    schedule = cosine_power(high, low, order)
    for epoch in range(epochs + 1):
        assert schedule(epoch / epochs) == pytest.approx(published(epoch), rel=1e-12)


def test_halves_are_disjoint_together_whole_and_in_proportion():
    task = tasks.images("digits")
    first, second = halves(task, 0.25, seed=3)
    rows = {
        name: torch.cat([x.flatten(1) for x, _ in t.batches("train", 500)])
        for name, t in (("all", task), ("first", first), ("second", second))
    }
    assert first.size("train") + second.size("train") == task.size("train")
    assert second.size("train") == pytest.approx(0.25 * task.size("train"), abs=1)
    bits = {name: sorted(row.numpy().tobytes() for row in found) for name, found in rows.items()}
    assert sorted(bits["first"] + bits["second"]) == bits["all"]
    count = {
        name: torch.bincount(torch.cat([y for _, y in t.batches("train", 500)]), minlength=10)
        for name, t in (("all", task), ("second", second))
    }
    assert (count["second"] - 0.25 * count["all"]).abs().max() <= 1
    assert first.size("validation") == task.size("validation")
    assert halves(task, 0.25, seed=3)[1].fingerprint == second.fingerprint
    assert halves(task, 0.25, seed=4)[1].fingerprint != second.fingerprint


class Listed(Task):
    """A task that is no TensorTask, whose test must not be read."""

    name, shape, classes = "listed", (2,), 1
    metrics = (Metric("error", goal="min", how="measured"),)

    def size(self, split):
        return 6

    def batches(self, split, batch, generator=None, augment=False):
        if split == "test":
            raise AssertionError("test was read")
        x = torch.arange(12.0).reshape(6, 2)
        for low in range(0, 6, batch):
            yield x[low : low + batch], x[low : low + batch, 0]

    def loss(self, outputs, targets):
        return (outputs[:, 0] - targets).abs().mean()

    def measure(self, outputs, targets):
        return {"error": float(self.loss(outputs, targets))}

    @property
    def fingerprint(self):
        return "listed"


def test_halves_of_any_task():
    first, second = halves(Listed(), 0.5)
    assert isinstance(first, TensorTask)
    seen = [float(y) for t in (first, second) for _, ys in t.batches("train", 2) for y in ys]
    assert sorted(seen) == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    assert first.measure(torch.ones(2, 1), torch.ones(2)) == {"error": 0.0}
    with pytest.raises(DataError, match="2 or more"):
        halves(Listed(), 0.1)
