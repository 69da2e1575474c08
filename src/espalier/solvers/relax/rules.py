"""Update rules: in which order, and down which gradients, weights and architecture move."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from espalier.errors import EspalierError
from espalier.solvers.relax.problem import Part, Problem


@dataclass(frozen=True)
class Losses:
    """What one step found, as scalars on the device; None where the architecture did not move."""

    weights: Tensor
    architecture: Tensor | None = None


class Rule(ABC):
    """One step of the search.

    `splits`: whether weights and architecture have data of their own. `fine`: whether it needs fp32,
    which settings' precision "auto" then stands for.
    """

    splits: bool = True
    fine: bool = False

    def start(self, problem: Problem) -> None:
        """Called once, before the first step and before a checkpoint is loaded."""
        return None

    @abstractmethod
    def step(self, problem: Problem, architecture: bool) -> Losses:
        """Moves the weights, and the architecture if asked."""

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold besides weights and logits."""
        return {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts back what `tensors` gave."""
        return None


@dataclass(frozen=True)
class FirstOrder(Rule):
    """Architecture down its own loss at the present weights, then weights down theirs.

    DARTS's first-order approximation (Liu et al., 2019); the cheapest, and biased: it takes the
    weights as if they did not answer to the architecture.
    """

    def step(self, problem: Problem, architecture: bool) -> Losses:
        """Two forward and backward passes."""
        found = None
        if architecture:
            with fixed(problem.weights):
                found = problem.loss("validation", "architecture")
                backward(found, problem.architecture)
            problem.descend("architecture")
        return Losses(_weights_step(problem), None if found is None else found.detach())


@dataclass(frozen=True)
class SingleLevel(Rule):
    """Weights and architecture on the same batch, in one backward pass (as in Single-Path NAS)."""

    splits = False

    def step(self, problem: Problem, architecture: bool) -> Losses:
        """One forward and backward pass."""
        if not architecture:
            return Losses(_weights_step(problem))
        loss = problem.loss("train", "both")
        backward(loss, [*problem.weights, *problem.architecture])
        problem.descend("architecture")
        problem.descend("weights")
        return Losses(loss.detach(), loss.detach())


@dataclass(frozen=True)
class SecondOrder(Rule):
    """Architecture down its loss at weights one step ahead, with how that step hangs on it.

    The gradient is that of L_val(w - rate * step(L_train), a); its second derivative is a finite
    difference of two gradients at w +- e v, e = `epsilon` / |v| (DARTS, Liu et al., 2019).
    `rate`: length of the step ahead; None takes the weights' present learning rate. In bf16 the
    difference is rounding error: its cosine with that in fp32 was 0.08, measured on NAS-Bench-201's
    supernet with digits; "auto" precision is fp32.
    """

    fine = True
    rate: float | None = None
    epsilon: float = 0.01

    def __post_init__(self) -> None:
        if self.epsilon <= 0 or (self.rate is not None and self.rate < 0):
            raise EspalierError(
                "SecondOrder takes an epsilon above 0 and a rate from 0, got "
                f"{self.epsilon!r} and {self.rate!r}"
            )

    def step(self, problem: Problem, architecture: bool) -> Losses:
        """Five forward and backward passes."""
        found = self._architecture(problem) if architecture else None
        return Losses(_weights_step(problem), found)

    def _architecture(self, problem: Problem) -> Tensor:
        weights: list[Tensor] = list(problem.weights)
        logits: list[Tensor] = list(problem.architecture)
        group = problem.optimiser.param_groups[0]
        rate = float(group["lr"]) if self.rate is None else self.rate
        saved = [w.detach().clone() for w in weights]
        ahead = _direction(problem, weights)
        with torch.no_grad():
            torch._foreach_add_(weights, ahead, alpha=-rate)
        loss = problem.loss("validation", "architecture")
        both = gradients(loss, [*weights, *logits])
        of_weights, of_logits = both[: len(weights)], both[len(weights) :]
        length = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(of_weights))))
        step = self.epsilon / max(length, 1e-12)
        sides = []
        for sign in (1.0, -1.0):
            _put(weights, saved)
            with torch.no_grad():
                torch._foreach_add_(weights, of_weights, alpha=sign * step)
            sides.append(gradients(problem.loss("train", "both"), logits))
        _put(weights, saved)
        for logit, own, plus, minus in zip(logits, of_logits, *sides, strict=True):
            logit.grad = own - rate * (plus - minus) / (2 * step)
        problem.descend("architecture")
        return loss.detach()


class Rarts(Rule):
    """Two copies of the weights share one architecture, and both halves teach it (RARTS, Xue et al., 2022).

    Minimises L_val(y, a) + share L_train(w, a) + pull/2 |y - w|^2 by one step each of w, y and a, in
    that order; no second derivatives. With `in_turn` each sees the newest of the others, as
    published: four passes. Without, all gradients are taken first, in two passes; the points where
    it rests are the same. Settings' weight decay acts on w and on y.
    """

    def __init__(self, share: float = 1.0, pull: float = 1.0, in_turn: bool = True) -> None:
        if share <= 0 or pull < 0:
            raise EspalierError(
                f"Rarts takes a share above 0 and a pull from 0, got {share!r} and {pull!r}"
            )
        self.share, self.pull, self.in_turn = share, pull, in_turn
        self._twin: Problem | None = None

    def start(self, problem: Problem) -> None:
        """Makes the second copy of the weights."""
        self._twin = problem.twin()

    def step(self, problem: Problem, architecture: bool) -> Losses:
        """One step of w, of y and, if asked, of the architecture."""
        twin = self._twin
        assert twin is not None
        joint = architecture and not self.in_turn
        train = self._towards(problem, twin, "train", self.share, joint)
        if not joint:
            problem.descend("weights")
        validation = self._towards(twin, problem, "validation", 1.0, joint)
        if joint:
            problem.descend("weights")
        twin.descend("weights")
        if architecture and self.in_turn:
            self._teach(problem, "train", self.share)
            self._teach(twin, "validation", 1.0)
        if architecture:
            problem.descend("architecture")
        return Losses(train, validation if architecture else None)

    def _teach(self, problem: Problem, part: Part, share: float) -> None:
        """Adds the gradients of one copy's loss for the architecture."""
        with fixed(problem.weights):
            backward(share * problem.loss(part, "architecture"), problem.architecture)

    def _towards(
        self, mover: Problem, other: Problem, part: Part, share: float, joint: bool
    ) -> Tensor:
        """Fills the gradients of one copy: of its loss, and of its distance to the other copy."""
        weights = list(mover.weights)
        loss = mover.loss(part, "both" if joint else "weights")
        backward(share * loss, [*weights, *mover.architecture] if joint else weights)
        with torch.no_grad():
            apart = torch._foreach_sub(list[Tensor](weights), list[Tensor](other.weights))
            torch._foreach_mul_(apart, self.pull)
            for weight, pulled in zip(weights, apart, strict=True):
                weight.grad = pulled if weight.grad is None else weight.grad.add_(pulled)
        return loss.detach()

    @property
    def second(self) -> Problem:
        """The problem with the weights y."""
        assert self._twin is not None
        return self._twin

    def tensors(self) -> dict[str, Tensor]:
        """The second copy: its state and momenta."""
        state = getattr(self._twin, "tensors", None)
        return {} if state is None else dict(state())

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts the second copy back."""
        load = getattr(self._twin, "load", None)
        if load is not None:
            load(tensors)


@contextmanager
def fixed(weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Weights that take no gradient: what only their gradient needs is not kept in memory."""
    for weight in weights:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


def backward(loss: Tensor, parameters: Sequence[nn.Parameter]) -> None:
    """Adds the gradients for these parameters alone; what does not hang on them is not computed."""
    loss.backward(inputs=list(parameters))  # type: ignore[no-untyped-call]


def gradients(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The gradients for these parameters, zeros where the loss does not hang on one."""
    found = torch.autograd.grad(loss, list(parameters), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]


def _weights_step(problem: Problem) -> Tensor:
    loss = problem.loss("train", "weights")
    backward(loss, problem.weights)
    problem.descend("weights")
    return loss.detach()


def _direction(problem: Problem, weights: list[Tensor]) -> list[Tensor]:
    """What SGD would step along: gradient, decay and momentum."""
    group, state = problem.optimiser.param_groups[0], problem.optimiser.state
    # "both", as its differences are taken: of one sample of the mixture, with the terms on weights
    found = gradients(problem.loss("train", "both"), weights)
    decay, momentum = group.get("weight_decay", 0.0), group.get("momentum", 0.0)
    out = []
    for weight, gradient in zip(weights, found, strict=True):
        step = gradient.add(weight.detach(), alpha=decay) if decay else gradient
        before = state[weight].get("momentum_buffer") if weight in state else None
        out.append(step if before is None or not momentum else step + momentum * before)
    return out


def _put(weights: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        torch._foreach_copy_(list(weights), list(values))
