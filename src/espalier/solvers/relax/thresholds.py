"""Learned thresholds on the norms of shared weights (Single-Path NAS, Stamoulis et al., 2019)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from espalier.errors import SpaceError
from espalier.solvers.relax.moment import Moment
from espalier.solvers.relax.relaxation import Logits, Relaxation

if TYPE_CHECKING:
    from espalier.nets.elastic.mixing import Mixture


class Thresholds(Relaxation):
    """The supernet says itself which options its weights ask for: there are no logits.

    It must have `indicators() -> Mixture`, differentiable, and `architecture_parameters()`: the
    thresholds, which architecture steps learn and weight steps leave.
    """

    def __init__(self) -> None:
        self._supernet: Any = None

    def start(
        self, supernet: Any, names: Sequence[str], generator: torch.Generator
    ) -> dict[str, nn.Parameter]:
        """The supernet's own thresholds by name. Errors: `SpaceError` where it has none."""
        if not hasattr(supernet, "indicators") or not hasattr(supernet, "architecture_parameters"):
            raise SpaceError(
                "Thresholds needs a supernet with indicators() and architecture_parameters(), such "
                f"as Superkernel; {type(supernet).__name__} has not both"
            )
        self._supernet = supernet
        return named(supernet, supernet.architecture_parameters())

    def weights(self, logits: Logits, moment: Moment) -> Mixture:
        """What the supernet's indicators say."""
        found: Mixture = self._supernet.indicators()
        return found

    def probabilities(self, logits: Logits) -> dict[str, Tensor]:
        """The indicators: 0 or 1 in value, differentiable by their surrogate."""
        found: Mapping[str, Tensor] = self._supernet.indicators()
        return dict(found)


def named(
    supernet: nn.Module, found: Mapping[str, nn.Parameter] | Iterable[Any]
) -> dict[str, nn.Parameter]:
    """Parameters with their names in the supernet; a mapping, pairs or the parameters alone."""
    if isinstance(found, Mapping):
        return dict(found)
    listed = list(found)
    if listed and isinstance(listed[0], tuple):
        return dict(listed)
    names = {id(p): name for name, p in supernet.named_parameters()}
    return {names[id(p)]: p for p in listed}


def architecture_parameters(supernet: Any) -> list[nn.Parameter]:
    """Parameters of the supernet that weight steps leave alone; none for most."""
    give = getattr(supernet, "architecture_parameters", None)
    return [] if give is None else list(named(supernet, give()).values())
