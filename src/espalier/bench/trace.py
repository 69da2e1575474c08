"""What one run of a strategy on a table was: which rows it queried, in which order, and when."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Index = NDArray[np.int64]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Trace:
    """The queries of one run in the order they finished.

    `rows` are row numbers of the table, `(q,)`; `values` `(q, m)` what the strategy was told, all
    minimised; `violations` `(q,)`; `times` `(q,)` the virtual seconds at which each finished
    (the count of queries where the table knows no seconds); `overhead` the real seconds that the
    strategy itself took.
    """

    rows: Index
    values: Array
    violations: Array
    times: Array
    overhead: float = 0.0

    def __len__(self) -> int:
        return len(self.rows)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON: rows and times."""
        return {
            "rows": self.rows.tolist(),
            "times": self.times.tolist(),
            "overhead": self.overhead,
        }
