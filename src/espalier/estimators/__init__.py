"""Estimators: how good candidates are, by training them, by shared weights or by neither."""

from espalier.estimators.calibration import Calibrated
from espalier.estimators.estimator import Estimator
from espalier.estimators.one_shot import OneShot
from espalier.estimators.rank_check import rank_check
from espalier.estimators.tabular import Tabular
from espalier.estimators.trained import Trained
from espalier.estimators.zero_cost import ZeroCost

__all__ = ["Calibrated", "Estimator", "OneShot", "Tabular", "Trained", "ZeroCost", "rank_check"]
