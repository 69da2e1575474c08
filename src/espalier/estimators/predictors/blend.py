"""Several predictors as one: the mean of their rankings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.errors import DataError
from espalier.estimators.predictors.regressor import Regressor
from espalier.estimators.predictors.scale import Scale, labelled

Array = NDArray[np.float64]
Features = Callable[[Any], Array]


class Blend(Regressor):
    """Each part learns the same labels from features of its own; their scores are averaged.

    `parts` are pairs of a regressor and the features `(n, k)` that it reads of `x`, None for `x` as
    it is. A score is where a prediction falls among the part's own predictions of `reference`, 0..1,
    so parts of any scale weigh alike, and what is predicted does not hang on the batch. The spread is
    that between the parts. Errors: `DataError` without parts, and before `fit`.
    """

    name = "blend"

    def __init__(self, parts: Sequence[tuple[Regressor, Features | None]], reference: Any) -> None:
        if not parts:
            raise DataError("a blend needs at least one part, got none")
        self.parts, self.reference = tuple(parts), reference
        self.scale = Scale()
        self._known: list[Array] = []

    def fit(self, x: Any, y: Any, seed: int = 0) -> None:
        """Every part learns the rows `x` and their values `y` `(n,)`."""
        labels = labelled(y)
        for regressor, features in self.parts:
            regressor.fit(x if features is None else features(x), labels, seed)
        self._place()
        self.scale = _line(self._places(x).mean(0), labels)

    def predict(self, x: Any) -> tuple[Array, Array]:
        """Mean and standard deviation over the parts `(n,)`, in the unit of y."""
        if not self._known:
            raise DataError("this predictor knows no data yet: call fit first")
        return self.scale.values(self._places(x))

    def _place(self) -> None:
        self._known = [np.sort(mean) for mean in self._means(self.reference)]

    def _places(self, x: Any) -> Array:
        rows = [
            np.interp(mean, known, np.linspace(0, 1, len(known)))
            for mean, known in zip(self._means(x), self._known, strict=True)
        ]
        return np.array(rows)

    def _means(self, x: Any) -> list[Array]:
        return [r.predict(x if f is None else f(x))[0] for r, f in self.parts]

    def settings(self) -> dict[str, Any]:
        """The parts' settings, as plain JSON."""
        parts = [{"name": r.name, **r.settings()} for r, _ in self.parts]
        return {"name": self.name, "parts": parts}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What the parts have learnt; nothing before `fit`."""
        if not self._known:
            return {}
        out: dict[str, NDArray[Any]] = dict(self.scale.arrays())
        for i, (regressor, _) in enumerate(self.parts):
            out |= {f"part{i}.{k}": v for k, v in regressor.arrays().items()}
        return out

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Takes over what `arrays` gave."""
        self._known = []
        if "scale.line" not in arrays:
            return
        for i, (regressor, _) in enumerate(self.parts):
            own = f"part{i}."
            regressor.restore(
                {k.removeprefix(own): v for k, v in arrays.items() if k.startswith(own)}
            )
        self.scale = Scale.restored(arrays)
        self._place()


def _line(places: Array, labels: Array) -> Scale:
    """From mean places to labels; places are on one scale already, so no part is scaled."""
    line = Scale.of(places[None], labels)
    slope = line.slope / float(line.spread[0])
    return Scale(slope=slope, offset=line.offset - slope * float(line.mean[0]))
