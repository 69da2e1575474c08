"""Predictors: regressors that learn how good candidates are, and the estimator made of one.

`make_regressor("gaussian")` makes a regressor by name; `REGRESSORS` lists the names. A regressor's
file is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from espalier.errors import EspalierError, unknown
from espalier.estimators.predictors.regressor import Regressor

if TYPE_CHECKING:
    from espalier.estimators.predictors.boosting import Boosting
    from espalier.estimators.predictors.forest import ExtraTrees, Forest
    from espalier.estimators.predictors.gaussian import Gaussian
    from espalier.estimators.predictors.mlp import MLP
    from espalier.estimators.predictors.predictor import Predictor

_CLASSES = {
    "Boosting": "boosting",
    "ExtraTrees": "forest",
    "Forest": "forest",
    "Gaussian": "gaussian",
    "MLP": "mlp",
    "Predictor": "predictor",
}
REGRESSORS: dict[str, str] = {
    "gaussian": "Gaussian",
    "forest": "Forest",
    "extra_trees": "ExtraTrees",
    "boosting": "Boosting",
    "mlp": "MLP",
}


def make_regressor(name: str, **settings: Any) -> Regressor:
    """The regressor of a name. Errors: `EspalierError` for an unknown name or setting."""
    if name not in REGRESSORS:
        raise EspalierError(unknown("regressor", name, REGRESSORS))
    kind = __getattr__(REGRESSORS[name])
    known = [f for f, field in kind.__dataclass_fields__.items() if field.init]
    for setting in settings:
        if setting not in known:
            raise EspalierError(unknown(f"setting of {name}", setting, known))
    made: Regressor = kind(**settings)
    return made


def __getattr__(name: str) -> Any:
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_CLASSES[name]}"), name)


__all__ = [
    "MLP",
    "REGRESSORS",
    "Boosting",
    "ExtraTrees",
    "Forest",
    "Gaussian",
    "Predictor",
    "Regressor",
    "make_regressor",
]
