"""What every regressor is: learns numbers from features, and says how sure it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from espalier.errors import DataError

Array = NDArray[np.float64]


@dataclass
class Belief:
    """What a regressor believes of some rows: means and standard deviations `(n,)`, no noise."""

    mean: Array
    std: Array

    def condition(self, row: int) -> None:
        """As if `row` had been observed at its mean. Here: that row is certain."""
        self.std[row] = 0.0


@dataclass
class Regressor(ABC):
    """Maps features `(n, k)` to numbers `(n,)`.

    Dataclass fields are its settings. What it has learnt depends on the data, the settings and the
    seed only. `growth` says when a search that goes on should fit it again: as soon as the rows
    have grown by this factor.
    """

    name: ClassVar[str] = "regressor"
    growth: ClassVar[float] = 1.0

    @abstractmethod
    def fit(self, x: Array, y: Array, seed: int = 0) -> None:
        """Learns from rows; what was learnt before is forgotten."""

    @abstractmethod
    def predict(self, x: Array) -> tuple[Array, Array]:
        """Means and standard deviations `(n,)`, of values as they would be observed."""

    def believe(self, x: Array) -> Belief:
        """The belief about rows, to choose among them."""
        return Belief(*self.predict(x))

    def update(self, x: Array, y: Array) -> None:
        """Cheap learning between fits: all rows again. Here: nothing, it waits for the fit."""
        del x, y

    def hint(self) -> list[float]:
        """Numbers with which `resume` saves a fit; empty: fit again."""
        return []

    def resume(self, hint: list[float]) -> None:
        """Takes a hint over; `update` must follow. Errors: `DataError` where there are none."""
        raise DataError(f"{self.name} gives no hints, got {len(hint)} numbers: fit it again")

    def settings(self) -> dict[str, Any]:
        """The settings as plain JSON."""
        out = {}
        for f in fields(self):
            if f.init:
                value = getattr(self, f.name)
                out[f.name] = list(value) if isinstance(value, tuple) else value
        return out

    @abstractmethod
    def arrays(self) -> dict[str, NDArray[Any]]:
        """What was learnt, as arrays: `restore` gives a regressor that predicts the same."""

    @abstractmethod
    def restore(self, arrays: dict[str, NDArray[Any]]) -> None:
        """Takes over what `arrays` gave."""


def checked(x: Any, y: Any) -> tuple[Array, Array]:
    """Rows to learn from, as float64. Errors: `DataError` for what can't be learnt from."""
    x = np.ascontiguousarray(x, dtype=np.float64)
    y = np.ascontiguousarray(y, dtype=np.float64)
    if x.ndim != 2 or y.shape != (len(x),):
        raise DataError(f"a regressor takes x (n, k) and y (n,), got {x.shape} and {y.shape}")
    if len(x) == 0:
        raise DataError("a regressor needs at least one row, got none")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise DataError("a regressor takes finite numbers: leave out rows with NaN or infinity")
    return x, y


class Refitted(Regressor):
    """A regressor whose saved form is its training data: `restore` fits again, alike."""

    def __post_init__(self) -> None:
        self._x, self._y, self._seed = np.zeros((0, 0)), np.zeros(0), 0

    def _keep(self, x: Array, y: Array, seed: int) -> None:
        self._x, self._y, self._seed = x, y, seed

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Training data and seed."""
        return {"x": self._x, "y": self._y, "seed": np.array([self._seed], dtype=np.int64)}

    def restore(self, arrays: dict[str, NDArray[Any]]) -> None:
        """Fits again."""
        self.fit(arrays["x"], arrays["y"], int(arrays["seed"][0]))
