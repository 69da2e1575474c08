"""What every cost is: a map from candidates to named columns of numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from espalier.problem import Metric, Metrics
from espalier.space import Candidate, Space


class Builder(Protocol):
    """What a cost needs of a family: its space, its networks and an example input."""

    @property
    def space(self) -> Space: ...

    def build(self, candidate: Candidate) -> nn.Module: ...

    def example(self, batch: int = 1) -> Tensor: ...


class Cost(ABC):
    """Prices candidates of one family. Own costs subclass it; `metrics` says what it gives."""

    metrics: tuple[Metric, ...] = ()

    @abstractmethod
    def estimate(self, candidates: Sequence[Candidate]) -> Metrics:
        """The columns of `metrics`, a row a candidate, in the order given."""


class CodeCost(Cost):
    """A cost that prices whole arrays of codes at once: what the inner loop of a search uses."""

    space: Space

    @abstractmethod
    def estimate_codes(self, codes: NDArray[Any]) -> Metrics:
        """The columns of `metrics` for codes `(n, d)`."""

    def estimate(self, candidates: Sequence[Candidate]) -> Metrics:
        """The columns of `metrics`, a row a candidate."""
        codes = self.space.encode(candidates)
        return self.estimate_codes(np.asarray(codes))
