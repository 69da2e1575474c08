"""Boosted trees: an ensemble of LightGBM models (Ke et al., 2017) on resampled rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from espalier.errors import DataError, MissingExtra
from espalier.estimators.predictors.regressor import Array, Regressor, checked


def _lightgbm() -> Any:
    try:
        import lightgbm
    except ImportError:
        raise MissingExtra("lightgbm", "trees") from None
    return lightgbm


@dataclass
class Boosting(Regressor):
    """Models that differ in their seed and rows; the deviation is that between them.

    - `members`: how many models.
    - `rounds`, `rate`: trees a model, and how much each is trusted.
    - `leaves`: of a tree, at most.
    - `share`: of rows and of features that each tree sees.

    Errors: `MissingExtra` without LightGBM.
    """

    members: int = 5
    rounds: int = 120
    rate: float = 0.08
    leaves: int = 8
    share: float = 0.8
    name: ClassVar[str] = "boosting"
    growth: ClassVar[float] = 1.05

    def __post_init__(self) -> None:
        _lightgbm()
        self._models: list[Any] = []

    def fit(self, x: Array, y: Array, seed: int = 0) -> None:
        """Trains every member, on one thread."""
        x, y = checked(x, y)
        gbm = _lightgbm()
        options = {
            "objective": "regression",
            "learning_rate": self.rate,
            "num_leaves": self.leaves,
            "min_data_in_leaf": max(1, min(5, len(x) // 10)),
            "min_sum_hessian_in_leaf": 0.0,
            "bagging_fraction": self.share if len(x) >= 10 else 1.0,
            "bagging_freq": 1,
            "feature_fraction": self.share,
            "min_data_in_bin": 1,
            "feature_pre_filter": False,
            "deterministic": True,
            "force_row_wise": True,
            "num_threads": 1,
            "verbosity": -1,
        }
        self._models = [
            gbm.train(
                {**options, "seed": (seed * 1000 + member) % 2**31},
                gbm.Dataset(x, y, free_raw_data=True),
                num_boost_round=self.rounds,
            )
            for member in range(self.members)
        ]

    def predict(self, x: Array) -> tuple[Array, Array]:
        """Mean and deviation over the members."""
        if not self._models:
            raise DataError("a regressor is fitted before it predicts: call fit")
        each = np.stack([np.asarray(m.predict(x, num_threads=1)) for m in self._models])
        return each.mean(axis=0), each.std(axis=0)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The models in LightGBM's text form, which loads exactly."""
        texts = [m.model_to_string().encode() for m in self._models]
        return {f"model{i}": np.frombuffer(t, dtype=np.uint8) for i, t in enumerate(texts)}

    def restore(self, arrays: dict[str, NDArray[Any]]) -> None:
        """Reads the models back."""
        texts = [arrays[f"model{i}"].tobytes().decode() for i in range(len(arrays))]
        self._models = [_lightgbm().Booster(model_str=text) for text in texts]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.settings(), "_arrays": self.arrays()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        arrays = state.pop("_arrays")
        self.__dict__.update(state)
        self.restore(arrays)
