"""Update rules on the toy of DARTS and RARTS, which is solved on paper, and on random quadratics.

L_val(w, a) = a w - 2 a + 1 and L_train(w, a) = w^2 - 2 a w + a^2: the weights that train best are
w = a, and with them L_val = (a - 1)^2, so the answer is a = 1.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from espalier.solvers.relax import FirstOrder, Rarts, Rule, SecondOrder, SingleLevel

LossOf = Callable[[Tensor, Tensor], Tensor]


class Paper:
    """A problem of two losses of one vector of weights and one of architecture."""

    def __init__(
        self,
        train: LossOf,
        validation: LossOf,
        w: Tensor,
        a: nn.Parameter,
        lr: float,
        arch_lr: float,
        momentum: float = 0.0,
        decay: float = 0.0,
    ) -> None:
        self.w, self.a = nn.Parameter(w.clone()), a
        self.weights, self.architecture = [self.w], [a]
        self.losses = {"train": train, "validation": validation}
        self.told = (train, validation, w, a, lr, arch_lr, momentum, decay)
        self.optimiser = torch.optim.SGD(self.weights, lr, momentum, weight_decay=decay)
        self.of_architecture = torch.optim.SGD(self.architecture, arch_lr)

    def loss(self, part: str, wanted: str) -> Tensor:
        return self.losses[part](self.w, self.a)

    def descend(self, wanted: str) -> None:
        optimiser = self.optimiser if wanted == "weights" else self.of_architecture
        optimiser.step()
        optimiser.zero_grad()

    def twin(self) -> Paper:
        train, validation, _, a, *rest = self.told
        return Paper(train, validation, self.w.detach(), a, *rest)


def toy(lr: float, arch_lr: float, start: tuple[float, float] = (0.5, 0.0)) -> Paper:
    return Paper(
        lambda w, a: (w * w - 2 * a * w + a * a).sum(),
        lambda w, a: (a * w - 2 * a + 1).sum(),
        torch.tensor([start[0]], dtype=torch.float64),
        nn.Parameter(torch.tensor([start[1]], dtype=torch.float64)),
        lr,
        arch_lr,
    )


def run(rule: Rule, problem: Paper, steps: int) -> float:
    rule.start(problem)
    for _ in range(steps):
        rule.step(problem, architecture=True)
    return float(problem.a.detach())


def test_first_order_goes_elsewhere():
    # it rests where dL_val/da = w - 2 is 0 with w = a
    assert run(FirstOrder(), toy(0.2, 0.05), 400) == pytest.approx(2.0, abs=1e-3)


def test_second_order_reaches_the_minimiser():
    # one step of length 1/2 ahead solves the training of the weights exactly
    assert run(SecondOrder(rate=0.5), toy(0.2, 0.05), 400) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("rate", [0.1, 0.25])
def test_second_order_rests_where_its_own_step_ahead_says(rate):
    # d/da L_val(w - 2 rate (w - a), a) at w = a is a - 2 + 2 rate a
    wanted = 2 / (1 + 2 * rate)
    assert run(SecondOrder(rate=rate), toy(0.2, 0.05), 400) == pytest.approx(wanted, abs=1e-3)


def test_rarts_comes_as_near_to_the_minimiser_as_its_penalties_ask():
    # all three gradients are 0 at a = 2 / (2 - 1/(2 share) - 1/pull), which goes to 1
    near = run(Rarts(share=20, pull=20), toy(0.01, 0.01), 900)
    assert near == pytest.approx(2 / (2 - 1 / 40 - 1 / 20), abs=2e-3)
    assert abs(near - 1) < 0.05


@pytest.mark.parametrize("in_turn", [True, False])
def test_rarts_rests_where_all_its_gradients_are_zero(in_turn):
    found = run(Rarts(share=3, pull=4, in_turn=in_turn), toy(0.05, 0.05), 500)
    assert found == pytest.approx(2 / (2 - 1 / 6 - 1 / 4), abs=1e-4)


def test_a_step_of_rarts_is_the_three_formulas_in_turn():
    share, pull, lr, arch_lr = 3.0, 4.0, 0.05, 0.02
    w, y, a = 0.5, 0.5, 0.3
    problem = toy(lr, arch_lr, (w, a))
    rule = Rarts(share, pull)
    rule.start(problem)
    for _ in range(3):
        rule.step(problem, architecture=True)
        w = w - lr * (share * 2 * (w - a) + pull * (w - y))
        y = y - lr * (a + pull * (y - w))
        a = a - arch_lr * (share * 2 * (a - w) + y - 2)
        assert float(problem.w.detach()) == pytest.approx(w, abs=1e-12)
        assert float(rule.second.weights[0].detach()) == pytest.approx(y, abs=1e-12)
        assert float(problem.a.detach()) == pytest.approx(a, abs=1e-12)


def test_a_step_of_second_order_is_the_gradient_through_the_step_ahead():
    """Against automatic differentiation through the unrolled step, momentum and decay included."""
    torch.manual_seed(0)
    mix, bend = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)

    def train(w: Tensor, a: Tensor) -> Tensor:
        return (torch.sin(w) * (mix @ a)).sum() + (w * w).sum() * a.sum()

    def validation(w: Tensor, a: Tensor) -> Tensor:
        return (torch.cos(w * bend)).sum() * a.prod() + (a * a).sum()

    lr, momentum, decay = 0.1, 0.9, 0.01
    w0 = torch.randn(4, dtype=torch.float64)
    a = nn.Parameter(torch.randn(3, dtype=torch.float64))
    problem = Paper(train, validation, w0, a, lr, 1.0, momentum, decay)
    buffer = torch.randn(4, dtype=torch.float64)
    problem.optimiser.state[problem.w]["momentum_buffer"] = buffer.clone()
    before = a.detach().clone()

    arch = before.clone().requires_grad_()
    w = w0.clone().requires_grad_()
    (slope,) = torch.autograd.grad(train(w, arch), w, create_graph=True)
    ahead = w - lr * (slope + decay * w + momentum * buffer)
    (wanted,) = torch.autograd.grad(validation(ahead, arch), arch)

    rule = SecondOrder(epsilon=1e-4)
    rule.step(problem, architecture=True)
    assert torch.allclose(before - a.detach(), wanted, atol=1e-6)


def test_a_resting_architecture_stays():
    for rule in (FirstOrder(), SecondOrder(), SingleLevel(), Rarts()):
        problem = toy(0.1, 0.1)
        rule.start(problem)
        losses = rule.step(problem, architecture=False)
        assert float(problem.a.detach()) == 0
        assert losses.architecture is None
        assert float(problem.w.detach()) != 0.5
        assert problem.a.grad is None


def test_single_level_descends_one_loss_in_both():
    problem = toy(0.1, 0.05, (0.5, 0.2))
    SingleLevel().step(problem, architecture=True)
    assert float(problem.w.detach()) == pytest.approx(0.5 - 0.1 * 2 * 0.3)
    assert float(problem.a.detach()) == pytest.approx(0.2 + 0.05 * 2 * 0.3)
