"""The search space: decisions, conditions, constraints; candidates and their codes. Numpy only."""

from espalier.space.candidate import Candidate
from espalier.space.constraints import Constraint, Forbid, Linear
from espalier.space.decisions import (
    Categorical,
    Decision,
    Integer,
    Ordinal,
    Real,
    choice,
    integer,
    ordinal,
    real,
)
from espalier.space.options import Option
from espalier.space.space import Space

__all__ = [
    "Candidate",
    "Categorical",
    "Constraint",
    "Decision",
    "Forbid",
    "Integer",
    "Linear",
    "Option",
    "Ordinal",
    "Real",
    "Space",
    "choice",
    "integer",
    "ordinal",
    "real",
]
