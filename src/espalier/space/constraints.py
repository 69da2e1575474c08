"""Constraints between decisions, as data: a linear bound, and a forbidden combination."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from espalier.errors import SpaceError
from espalier.space.frozen import FrozenMap
from espalier.space.options import Option, name_of, number, plain


@dataclass(frozen=True)
class Constraint(ABC):
    """A rule that valid candidates keep; it says nothing while a decision it names is inactive."""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The decisions it speaks of."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """The constraint as plain JSON."""


@dataclass(frozen=True)
class Linear(Constraint):
    """The sum of coefficient x value is at most ("<=") or at least (">=") `bound`.

    Values are those of ordinal, integer and real decisions. A relative tolerance of 1e-12 absorbs
    rounding.
    """

    coefficients: Mapping[str, float]
    op: Literal["<=", ">="] = "<="
    bound: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.coefficients, Mapping) or not self.coefficients:
            rule = "Linear needs a mapping of decisions to coefficients"
            raise SpaceError(f"{rule}, got {self.coefficients!r}")
        if self.op not in ("<=", ">="):
            raise SpaceError(f"Linear's op is '<=' or '>=', got {self.op!r}")
        items = {
            name_of(name, "decision"): number(c, f"Linear: the coefficient of {name!r}")
            for name, c in self.coefficients.items()
        }
        object.__setattr__(self, "coefficients", FrozenMap(items))
        object.__setattr__(self, "bound", number(self.bound, "Linear: the bound"))

    @property
    def names(self) -> tuple[str, ...]:
        """The decisions it sums."""
        return tuple(self.coefficients)

    def to_json(self) -> dict[str, Any]:
        """Kind, coefficients, op, bound."""
        terms = dict(self.coefficients)
        return {"kind": "linear", "coefficients": terms, "op": self.op, "bound": self.bound}

    def __str__(self) -> str:
        terms = " + ".join(f"{c:g} {name}" for name, c in self.coefficients.items())
        return f"{terms} {self.op} {self.bound:g}"


@dataclass(frozen=True)
class Forbid(Constraint):
    """No candidate has all of these options at once."""

    options: Mapping[str, Option]

    def __post_init__(self) -> None:
        if not isinstance(self.options, Mapping) or not self.options:
            raise SpaceError(
                f"Forbid needs a mapping of decisions to options, got {self.options!r}"
            )
        items = {name_of(n, "decision"): plain(o, "Forbid") for n, o in self.options.items()}
        object.__setattr__(self, "options", FrozenMap(items))

    @property
    def names(self) -> tuple[str, ...]:
        """The decisions of the combination."""
        return tuple(self.options)

    def to_json(self) -> dict[str, Any]:
        """Kind, options."""
        return {"kind": "forbid", "options": dict(self.options)}

    def __str__(self) -> str:
        return "not " + " with ".join(f"{name}={option}" for name, option in self.options.items())
