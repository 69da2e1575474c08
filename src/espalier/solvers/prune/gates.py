"""What every gate is: a relaxation whose mixtures are masks of units."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from espalier.errors import SpaceError
from espalier.solvers.prune.budget import hat
from espalier.solvers.relax.relaxation import Logits, Relaxation

if TYPE_CHECKING:
    from espalier.compress.gates import Gated


class UnitGates(Relaxation):
    """Masks for the units of a `Gated` model, in the place of weights for the options of a supernet.

    A term of the loss reads the probabilities of options: here those beside the number of units kept.
    """

    def start(
        self, supernet: Any, names: Sequence[str], generator: torch.Generator
    ) -> dict[str, nn.Parameter]:
        """What is learned, by decision. Errors: `SpaceError` for a model without gates."""
        if not hasattr(supernet, "importances"):
            raise SpaceError(
                f"{type(self).__name__} gates the units of a trained model, got"
                f" {type(supernet).__name__}: make it a Gated first"
            )
        self.gated: Gated = supernet
        device = next(supernet.parameters()).device
        return {
            name: nn.Parameter(first.to(device))
            for name, first in self.first(names, generator).items()
        }

    @abstractmethod
    def first(self, names: Sequence[str], generator: torch.Generator) -> dict[str, Tensor]:
        """Where learning starts, a tensor a decision."""

    @abstractmethod
    def kept(self, logits: Logits) -> dict[str, Tensor]:
        """How many units are kept, a scalar a decision, differentiable."""

    @abstractmethod
    def scores(self, logits: Logits) -> dict[str, Tensor]:
        """How much each unit matters in the end, `(units,)` a decision: the order of the cut."""

    def probabilities(self, logits: Logits) -> dict[str, Tensor]:
        """The number of units kept, as the weights of the two options beside it."""
        return {n: hat(kept, self.gated.counts[n]) for n, kept in self.kept(logits).items()}


def straight(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of `hard` with the gradient of `soft` (Bengio et al., 2013)."""
    return hard + (soft - soft.detach())


def largest(scores: Tensor, kept: int) -> Tensor:
    """1 for the `kept` largest, 0 for the others."""
    out = torch.zeros_like(scores)
    out[torch.topk(scores, kept).indices] = 1.0
    return out
