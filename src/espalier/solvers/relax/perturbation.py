"""Perturbation: of each decision, the option whose removal hurts the trained supernet most.

Wang, Cheng, Chen, Tang & Hsieh, "Rethinking Architecture Selection in Differentiable NAS", 2021
(https://arxiv.org/abs/2108.04392).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from espalier.errors import EspalierError
from espalier.solvers.relax.selection import assemble
from espalier.solvers.relax.state import Selection, SelectionState
from espalier.space import Candidate, Space

_ORDER = 5  # purpose of the random stream that orders the decisions

Weights = dict[str, Tensor]


@dataclass
class Perturbation(Selection):
    """Decides one decision after the other, in random order, by what the mixture loses.

    Each option's weight is set to 0 and the rest left as they are; the option is kept without which
    the accuracy on validation is lowest, the decision is fixed to it, and the shared weights are
    tuned for `tune_epochs` before the next. Decisions that say which others take part (the inputs of
    a DARTS node) come last, also where they were not relaxed: there an input is removed with every
    option that has it, and the option is kept whose inputs hurt most in sum. `log` keeps a row a decision: what was left of the
    accuracy without each option.
    """

    tune_epochs: int = 1
    log: list[dict[str, Any]] = field(default_factory=list, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.tune_epochs < 0:
            raise EspalierError(f"tune_epochs must be 0 or more, got {self.tune_epochs}")

    def __call__(self, state: SelectionState) -> Candidate:
        space: Space = state.supernet.space
        weights = mixture(state)
        chosen: dict[str, Tensor] = {}
        self.log.clear()
        names = [*weights, *waking(space, weights)]
        for name in ordered(space, names, state.seed):
            left = self._left(state, weights, name)
            # the first of equals, as argmin takes it: nothing else is known of them
            index = int(np.argmin(left))
            chosen[name] = state.one_hot(name, index).cpu()
            option = space[name].options[index]
            self.log.append({"decision": name, "left": left, "chosen": option})
            weights = decided(space, weights, name, index)
            if self.tune_epochs and len(chosen) < len(names):
                state.tune(weights, self.tune_epochs)
        return assemble(space, chosen, state.base, seed=state.seed)

    def _left(self, state: SelectionState, weights: Weights, name: str) -> list[float]:
        """What the removal of each option leaves of the accuracy; of a topology, in sum."""
        space: Space = state.supernet.space
        count, inputs = space[name].count, gated(space, name)
        if not inputs:
            masked = [{**weights, name: without(weights[name], [i])} for i in range(count)]
            return [state.evaluate(one) for one in masked]
        hurt = {
            child: state.evaluate(
                {**weights, name: without(weights[name], sorted(options))}
                if name in weights
                else {**weights, child: torch.zeros_like(weights[child])}
            )
            for child, options in inputs.items()
        }
        return [
            sum(hurt[child] for child, options in inputs.items() if i in options)
            for i in range(count)
        ]


def mixture(state: SelectionState) -> Weights:
    """The weights at the end of the search, a vector a decision; those of samples are averaged."""
    found = {n: w if isinstance(w, Tensor) else w.weights for n, w in state.mixture().items()}
    return {name: w if w.ndim == 1 else w.mean(dim=0) for name, w in found.items()}


def without(weights: Tensor, options: Sequence[int]) -> Tensor:
    """The weights with some options at 0; the others are not scaled up."""
    out = weights.clone()
    out[list(options)] = 0.0
    return out


def fixed(weights: Tensor, option: int) -> Tensor:
    """All of the decision's weight on one option: an edge keeps its strength."""
    out = torch.zeros_like(weights)
    out[option] = weights.sum()
    return out


def decided(space: Space, weights: Weights, name: str, option: int) -> Weights:
    """The mixture with one more decision made; inputs that a topology leaves out weigh nothing."""
    if name in weights:
        return {**weights, name: fixed(weights[name], option)}
    out = dict(weights)
    for child, options in gated(space, name).items():
        if option not in options:
            out[child] = torch.zeros_like(weights[child])
    return out


def waking(space: Space, weights: Weights) -> list[str]:
    """Decisions that are not relaxed and say which of the relaxed ones take part."""
    known = ((d.name, gated(space, d.name)) for d in space.decisions if d.name not in weights)
    return [name for name, inputs in known if inputs and set(inputs) <= set(weights)]


def gated(space: Space, name: str) -> dict[str, set[int]]:
    """The decisions that options of `name` switch on, each with the indices of those options.

    Empty where the options do not switch on equally many: those are no rivals of one kind, and
    each is judged by its own removal.
    """
    decision = space[name]
    found = {
        other.name: {int(decision.code(option)) for option in other.when[name]}
        for other in space.decisions
        if name in other.when
    }
    counts = {sum(i in on for on in found.values()) for i in range(decision.count)}
    return found if len(counts) == 1 and counts != {0} else {}


def ordered(space: Space, names: Sequence[str], seed: int) -> list[str]:
    """Decisions in random order, those that switch others on after all the rest."""
    rng = np.random.default_rng([seed, _ORDER])
    mixed = [names[i] for i in rng.permutation(len(names))]
    return sorted(mixed, key=lambda name: bool(gated(space, name)))
