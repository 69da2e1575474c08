"""Costs that stand in a table: measured once, looked up ever after."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.costs.cost import CodeCost
from espalier.problem import Metric, Metrics
from espalier.space import Space
from espalier.space.lookup import Lookup


@dataclass(frozen=True)
class Columns:
    """Columns of a table as a function of codes. Errors: `EspalierError` for an absent row."""

    lookup: Lookup
    columns: Mapping[str, NDArray[np.float64]]
    about: Sequence[Metric]

    def __call__(self, codes: NDArray[Any]) -> Metrics:
        found = self.lookup.rows(codes)
        return Metrics({m.name: self.columns[m.name][found] for m in self.about}, self.about)


class TabularCost(CodeCost):
    """Costs read from a table: `look(codes)` gives the columns of `metrics`.

    `bench.table.Table.cost("lat_pixel3")` makes one. Errors: `EspalierError` for a candidate that
    the table lacks.
    """

    def __init__(
        self,
        space: Space,
        metrics: Sequence[Metric],
        look: Callable[[NDArray[Any]], Metrics],
    ) -> None:
        self.space, self.metrics, self.look = space, tuple(metrics), look

    def estimate_codes(self, codes: NDArray[Any]) -> Metrics:
        """The columns of `metrics` for codes `(n, d)`."""
        return self.look(codes)
