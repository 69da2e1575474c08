"""What every relaxation is: how numbers that can be learned become the weights of a mixture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from espalier.errors import SpaceError
from espalier.solvers.relax.moment import Moment

if TYPE_CHECKING:
    from espalier.nets.elastic.mixing import Mixture

Logits = Mapping[str, nn.Parameter]
_SPREAD = 1e-3  # of the first logits: nearly even, ties broken


class Relaxation(ABC):
    """How a decision becomes continuous. The defaults suit one vector of logits a decision.

    An object belongs to one search at a time: some remember what they sampled last.
    """

    def start(
        self, supernet: Any, names: Sequence[str], generator: torch.Generator
    ) -> dict[str, nn.Parameter]:
        """What the architecture steps learn, by name: logits `(options,)`, normal with 1e-3."""
        device = next(supernet.parameters()).device
        out = {}
        for name in names:
            count = supernet.space[name].count
            if count == 0:
                raise SpaceError(
                    f"{name!r} is a real decision, which has no options to mix: leave it out of names"
                )
            drawn = torch.randn(count, generator=generator) * _SPREAD
            out[name] = nn.Parameter(drawn.to(device))
        return out

    @abstractmethod
    def weights(self, logits: Logits, moment: Moment) -> Mixture:
        """The mixture to run, differentiable in the logits."""

    def probabilities(self, logits: Logits) -> dict[str, Tensor]:
        """How probable each option is, `(options,)` a decision, adding up to 1; differentiable."""
        return {name: torch.softmax(found, 0) for name, found in logits.items()}

    def strengths(self, logits: Logits) -> dict[str, Tensor]:
        """How much an edge weighs among those that meet it, a scalar a decision; 1 if not named."""
        return {}

    def after_step(self, logits: Logits, before: Mapping[str, Tensor]) -> None:
        """Called after each architecture step, with what the logits were `before`; no gradients."""
        return None

    def tensors(self) -> dict[str, Tensor]:
        """What a search that goes on must have back, besides the logits."""
        return {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts back what `tensors` gave."""
        return None
