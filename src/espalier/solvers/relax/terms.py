"""What is added to the loss: expected cost, entropy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from espalier.errors import EspalierError
from espalier.solvers.relax.moment import Moment
from espalier.train.schedules import Schedule, constant, scheduled

if TYPE_CHECKING:
    from espalier.nets.elastic.mixing import Mixture

On = Literal["weights", "architecture", "both"]
Expected = Callable[[Mapping[str, Tensor]], Tensor]
Form = Literal["linear", "log", "hinge", "square", "product"]


@dataclass(frozen=True)
class TermState:
    """What a term may look at in a step. `outputs` and `loss` hang on what is learned in it."""

    supernet: Any
    inputs: Tensor
    targets: Tensor
    outputs: Tensor  # in fp32
    loss: Tensor  # the task's, without terms
    mixture: Mixture  # what ran
    probabilities: Mapping[str, Tensor]  # differentiable in architecture steps
    run: Callable[[nn.Module, Tensor], Tensor]  # a module on inputs in this search's precision
    held: Mapping[str, Tensor] = field(default_factory=dict)  # chances of what is not relaxed


class Term(ABC):
    """An addition to the loss of the steps that it is `on`, times its coefficient."""

    name: str = "term"
    on: On = "architecture"
    coefficient: Schedule = constant(1.0)

    @abstractmethod
    def __call__(self, moment: Moment, state: TermState) -> Tensor:
        """The term, a scalar, without its coefficient."""

    def added(self, moment: Moment, state: TermState) -> Tensor | None:
        """What the loss grows by; None where the coefficient is 0, which costs nothing."""
        coefficient = self.coefficient(moment.progress)
        return None if coefficient == 0 else coefficient * self(moment, state)

    def start(self, supernet: nn.Module) -> None:
        """Called once, before training or before a checkpoint is loaded."""
        return None

    def after_epoch(self, supernet: nn.Module, mixture: Mixture) -> None:
        """Called after each epoch with the mixture to evaluate; it may mix and activate freely."""
        return None

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold."""
        return {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts back what `tensors` gave."""
        return None


class ExpectedCost(Term):
    """The cost that the probabilities make likely, as a differentiable number.

    `expected` gives E from the probabilities, `target` its scale and, for a hinge, its limit:
    linear: E / target (ProxylessNAS, Cai et al., 2019); log: log(E / target) (Single-Path NAS,
    Stamoulis et al., 2019); hinge: max(0, E / target - 1); square: (E / target - 1)^2, which draws to
    the target from either side (Pruning-as-Search, Li et al., 2022); product: the task's loss is multiplied by
    coefficient * log(E / target)^power, where E / target must stay above 1 (FBNet, Wu et al., 2019).
    `of` "mixture" reads the weights that ran (FBNet) instead of the probabilities. Decisions that are
    not relaxed and that `expected.names` has count as they are held; which edges meet in a node, as
    even chances.
    """

    on: On = "architecture"

    def __init__(
        self,
        expected: Expected,
        target: float | None = None,
        form: Form = "linear",
        coefficient: Schedule | float = 1.0,
        *,
        power: float = 0.6,
        of: Literal["probabilities", "mixture"] = "probabilities",
        name: str = "cost",
    ) -> None:
        if form not in get_args(Form):
            known = ", ".join(get_args(Form))
            raise EspalierError(f"the form of an expected cost is one of {known}, got {form!r}")
        if target is not None and not target > 0:
            raise EspalierError(f"the target of an expected cost must be above 0, got {target!r}")
        if form in ("hinge", "square") and target is None:
            raise EspalierError(f"the form {form} of an expected cost needs a target: the limit")
        self.expected, self.target, self.form = expected, target, form
        self.coefficient, self.power, self.of, self.name = scheduled(coefficient), power, of, name

    def __call__(self, moment: Moment, state: TermState) -> Tensor:
        """The cost in its form; for a product its factor, without the coefficient."""
        read = state.probabilities if self.of == "probabilities" else _plain(state.mixture)
        wanted = getattr(self.expected, "names", ())
        cost = self.expected({**{n: state.held[n] for n in wanted if n in state.held}, **read})
        share = cost if self.target is None else cost / self.target
        if self.form == "linear":
            return share
        if self.form == "hinge":
            return torch.relu(share - 1)
        if self.form == "square":
            return (share - 1) ** 2
        log = torch.log(share)
        return log if self.form == "log" else log.clamp(min=1e-6) ** self.power

    def added(self, moment: Moment, state: TermState) -> Tensor | None:
        """As of every term; a product is written as a sum, so that terms stay independent."""
        if self.form != "product":
            return super().added(moment, state)
        coefficient = self.coefficient(moment.progress)
        if coefficient == 0:
            return None
        return state.loss * (coefficient * self(moment, state) - 1)


class Entropy(Term):
    """The mean entropy of the decisions, in nats: a coefficient above 0 makes them decide."""

    on: On = "architecture"
    name = "entropy"

    def __init__(self, coefficient: Schedule | float = 1.0) -> None:
        self.coefficient = scheduled(coefficient)

    def __call__(self, moment: Moment, state: TermState) -> Tensor:
        """Mean over the decisions of -sum p log p."""
        return entropy(state.probabilities)


def entropy(probabilities: Mapping[str, Tensor]) -> Tensor:
    """Mean over the decisions of -sum p log p, in nats, differentiable."""
    every = [torch.special.entr(p).sum() for p in probabilities.values()]
    return torch.stack(every).mean()


def _plain(mixture: Mixture) -> dict[str, Tensor]:
    return {n: w if isinstance(w, Tensor) else w.weights for n, w in mixture.items()}
