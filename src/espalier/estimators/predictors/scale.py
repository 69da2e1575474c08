"""From an ensemble's scores, each on a scale of its own, to values with a spread."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from espalier.errors import DataError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Scale:
    """Each member's mean and spread of scores on the training rows, and the line from there to y.

    Ranking losses leave a score's scale free; the line is fitted by least squares to the mean of
    the standardised scores, and never falls, so that the order stays the ensemble's.
    """

    mean: Array = field(default_factory=lambda: np.zeros(1))
    spread: Array = field(default_factory=lambda: np.ones(1))
    slope: float = 1.0
    offset: float = 0.0

    @classmethod
    def of(cls, scores: ArrayLike, labels: Array) -> Scale:
        """The scale of scores `(members, n)` of the rows with labels `(n,)`."""
        raw = np.asarray(scores, dtype=np.float64)
        spread = raw.std(1)
        found = cls(raw.mean(1), np.where(spread > 0, spread, 1.0))
        x = found.standard(raw).mean(0)
        moved = x - x.mean()
        power = float(moved @ moved)
        slope = float(moved @ labels) / power if power > 0 else 0.0
        slope = slope if slope > 0 else max(float(labels.std()), 1e-9)
        return cls(found.mean, found.spread, slope, float(labels.mean() - slope * x.mean()))

    def standard(self, scores: ArrayLike) -> Array:
        """Scores `(members, n)` on the members' common scale."""
        raw = np.asarray(scores, dtype=np.float64)
        return np.asarray((raw - self.mean[:, None]) / self.spread[:, None])

    def values(self, standard: Array) -> tuple[Array, Array]:
        """Mean and standard deviation `(n,)` over the members, in the unit of the labels."""
        return self.slope * standard.mean(0) + self.offset, self.slope * standard.std(0)

    def arrays(self) -> dict[str, Array]:
        """The scale as arrays, which `restored` reads."""
        line = np.array([self.slope, self.offset])
        return {"scale.mean": self.mean, "scale.spread": self.spread, "scale.line": line}

    @classmethod
    def restored(cls, arrays: Mapping[str, NDArray[Any]]) -> Scale:
        """The scale that `arrays` gave."""
        slope, offset = (float(v) for v in arrays["scale.line"])
        return cls(arrays["scale.mean"], arrays["scale.spread"], slope, offset)


def labelled(y: ArrayLike) -> Array:
    """Labels `(n,)` as floats. Errors: `DataError` for fewer than 2, or for NaN or infinity."""
    labels = np.asarray(y, dtype=np.float64).reshape(-1)
    if len(labels) < 2:
        raise DataError(f"a ranking needs at least 2 labels, got {len(labels)}")
    if not np.isfinite(labels).all():
        raise DataError("labels must be finite numbers: leave failed trainings out")
    return labels
