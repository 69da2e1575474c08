"""Candidates scored by a table of networks that others have trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.estimators.estimator import Estimator
from espalier.problem import Metric, Metrics
from espalier.space import Candidate, Space


class Tabular(Estimator):
    """Scores read from a table: `look(codes)` gives the columns of `metrics`.

    `bench.table.Table.estimator("val_acc")` makes one. Errors: `EspalierError` for a candidate that
    the table lacks.
    """

    def __init__(
        self,
        space: Space,
        metrics: Sequence[Metric],
        look: Callable[[NDArray[Any]], Metrics],
    ) -> None:
        self.space, self.metrics, self.look = space, tuple(metrics), look

    def estimate(self, candidates: Sequence[Candidate]) -> Metrics:
        """The columns of `metrics`, a row a candidate, in the order given."""
        return self.estimate_codes(np.asarray(self.space.encode(candidates)))

    def estimate_codes(self, codes: NDArray[Any]) -> Metrics:
        """The columns of `metrics` for codes `(n, d)`."""
        return self.look(codes)
