"""Forests: random forests (Breiman, 2001) and extremely randomised trees (Geurts et al., 2006)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from espalier.errors import DataError
from espalier.estimators.predictors.regressor import Array, Refitted, checked


@dataclass
class Forest(Refitted):
    """Trees of scikit-learn; the deviation is that between trees (Hutter et al., 2014).

    - `trees`: how many.
    - `features`: the share of features that a split looks at.
    - `leaf`: a leaf holds at least so many rows.
    """

    trees: int = 100
    features: float = 0.5
    leaf: int = 1
    name: ClassVar[str] = "forest"
    growth: ClassVar[float] = 1.05

    def __post_init__(self) -> None:
        super().__post_init__()
        self._model: Any = None

    def fit(self, x: Array, y: Array, seed: int = 0) -> None:
        """Grows the trees, on one thread."""
        x, y = checked(x, y)
        self._keep(x, y, seed)
        self._model = self._grower()(
            n_estimators=self.trees,
            max_features=self.features,
            min_samples_leaf=self.leaf,
            random_state=seed % 2**32,
            n_jobs=1,
        ).fit(x, y)

    def _grower(self) -> Any:
        from sklearn.ensemble import RandomForestRegressor

        return RandomForestRegressor

    def predict(self, x: Array) -> tuple[Array, Array]:
        """Mean and deviation over the trees."""
        if self._model is None:
            raise DataError("a regressor is fitted before it predicts: call fit")
        rows = np.ascontiguousarray(x, dtype=np.float32)  # what the trees split on
        each = np.stack([tree.tree_.predict(rows)[:, 0] for tree in self._model.estimators_])
        return each.mean(axis=0), each.std(axis=0)


@dataclass
class ExtraTrees(Forest):
    """Trees whose splits are drawn at random, on all rows: smoother than a random forest."""

    leaf: int = 2
    name: ClassVar[str] = "extra_trees"

    def _grower(self) -> Any:
        from sklearn.ensemble import ExtraTreesRegressor

        return ExtraTreesRegressor
