"""What every estimator is: a map from candidates to how good they are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from espalier.problem import Metric, Metrics
from espalier.space import Candidate


class Estimator(ABC):
    """Scores candidates. What it returns for a candidate depends on that candidate, the
    estimator's settings and its seed only: not on the batch, the order or the process."""

    metrics: tuple[Metric, ...] = ()

    @abstractmethod
    def estimate(self, candidates: Sequence[Candidate]) -> Metrics:
        """The columns of `metrics`, a row a candidate, in the order given."""
