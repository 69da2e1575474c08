"""Search by relaxation: decisions become gates with a gradient, learned with the shared weights.

`relax(supernet, task)` is DARTS; its slots are the relaxation, the update rule, terms of the loss
and the selection of the candidate.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from espalier.solvers.relax.distillation import SelfDistillation
from espalier.solvers.relax.edges import EdgeNormalised
from espalier.solvers.relax.gates import BinaryGates
from espalier.solvers.relax.gumbel import Gumbel
from espalier.solvers.relax.moment import Moment
from espalier.solvers.relax.problem import Problem
from espalier.solvers.relax.relaxation import Relaxation
from espalier.solvers.relax.relaxed import Relaxed
from espalier.solvers.relax.rules import FirstOrder, Rarts, Rule, SecondOrder, SingleLevel
from espalier.solvers.relax.selection import Magnitude, assemble
from espalier.solvers.relax.settings import Settings
from espalier.solvers.relax.softmax import MaxWeight, Softmax
from espalier.solvers.relax.solve import relax
from espalier.solvers.relax.state import Selection, SelectionState
from espalier.solvers.relax.terms import Entropy, ExpectedCost, Term, TermState
from espalier.solvers.relax.thresholds import Thresholds

__all__ = [
    "BinaryGates",
    "EdgeNormalised",
    "Entropy",
    "ExpectedCost",
    "FirstOrder",
    "Gumbel",
    "Magnitude",
    "MaxWeight",
    "Moment",
    "Perturbation",
    "Problem",
    "Rarts",
    "Relaxation",
    "Relaxed",
    "Rule",
    "Sampled",
    "SecondOrder",
    "Selection",
    "SelectionState",
    "SelfDistillation",
    "Settings",
    "SingleLevel",
    "Softmax",
    "Term",
    "TermState",
    "Thresholds",
    "assemble",
    "expected_cost",
    "relax",
]

_LATER = {
    "Perturbation": "perturbation",
    "Sampled": "sampled",
    "expected_cost": "expected",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
