"""Estimators: how good candidates are, by training them or by shared weights."""

from espalier.estimators.estimator import Estimator
from espalier.estimators.one_shot import OneShot
from espalier.estimators.trained import Trained

__all__ = ["Estimator", "OneShot", "Trained"]
