"""What every kind of decision on an existing model is: a cut, and that cut bound to one model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from espalier.space import Decision
from espalier.space.options import Option


@dataclass(frozen=True)
class Ignored:
    """A layer that a cut leaves alone, and why: "the stem's input are the task's channels"."""

    layer: str
    kind: str
    reason: str


class BoundCut(ABC):
    """The decisions that one cut finds on one model. It holds no copy of the model's weights that
    `apply` would not take from the module it is given.

    `decisions` are ordinal, options ascending; the last option is the original. A decision's name
    is the cut's kind, a colon and a name within the model: "width:layer1.0.conv1".
    """

    decisions: tuple[Decision, ...] = ()
    ignored: tuple[Ignored, ...] = ()

    @abstractmethod
    def apply(self, model: nn.Module, choices: Mapping[str, Option]) -> None:
        """Change a deep copy of the bound model in place, by the choices of this cut's names."""

    @abstractmethod
    def layers(self) -> Mapping[str, tuple[str, ...]]:
        """Leaf layer (its path) -> the decisions that decide its shape, its run, or its bits."""

    @abstractmethod
    def slice(self, name: str, layer: nn.Module, choices: Mapping[str, Option]) -> nn.Module | None:
        """One leaf layer as `apply` would leave it, made from `layer` without changing that; None
        where it does not run. Fast, no tracing: tables of costs call it for every option."""


class Cut(ABC):
    """A kind of decision, not bound to a model. Own cuts are frozen dataclasses of settings."""

    kind: ClassVar[str] = ""

    @abstractmethod
    def bind(self, model: nn.Module, example: Tensor) -> BoundCut:
        """Find the decisions of a model. Errors: `EspalierError` where it can't be read."""
