"""Sizes that may hang on decisions: an int, a decision, or a product of such."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from espalier.errors import SpaceError
from espalier.space import Decision, Integer, Option, Real

Choices: TypeAlias = Mapping[str, Option]


@dataclass(frozen=True)
class Product:
    """A size that is the product of two others, as `width * expansion` is.

    A product that is not whole is rounded to the nearest multiple of `divisor`, at least one.
    """

    left: Dim | float
    right: Dim | float
    divisor: int = 8

    def __post_init__(self) -> None:
        for factor in (self.left, self.right):
            if isinstance(factor, bool) or not isinstance(factor, (int, float, Decision, Product)):
                raise SpaceError(f"a product is of numbers and decisions, got {factor!r}")
        if not isinstance(self.divisor, int) or self.divisor < 1:
            raise SpaceError(f"a divisor must be a positive whole number, got {self.divisor!r}")

    def __mul__(self, other: Dim | float) -> Product:
        return Product(self, other, self.divisor)

    __rmul__ = __mul__


Dim: TypeAlias = int | Decision | Product


def product(left: Dim | float, right: Dim | float, divisor: int = 8) -> Product:
    """`left * right` as a size; rounded to a multiple of `divisor` where it is not whole."""
    return Product(left, right, divisor)


def decisions(dim: Dim | float) -> tuple[Decision, ...]:
    """The decisions that a size hangs on."""
    if isinstance(dim, Product):
        return tuple(dict.fromkeys(decisions(dim.left) + decisions(dim.right)))
    return (dim,) if isinstance(dim, Decision) else ()


def options(decision: Decision) -> tuple[Option, ...]:
    """All options of a decision, in its order; the two ends of a real one."""
    if isinstance(decision, Integer):
        return tuple(range(decision.low, decision.high + 1))
    if isinstance(decision, Real):
        return (decision.low, decision.high)
    found: Any = getattr(decision, "options", None)
    if found is None:
        raise SpaceError(f"decision {decision.name!r} has no options to take a size from")
    return tuple(found)


def value(dim: Dim | float, choices: Choices) -> float:
    """What a size or a factor is under `choices`, before it is checked to be whole."""
    if isinstance(dim, Decision):
        return float(choices[dim.name])
    if not isinstance(dim, Product):
        return float(dim)
    exact = value(dim.left, choices) * value(dim.right, choices)
    if math.isclose(exact, round(exact), abs_tol=1e-6):
        return float(round(exact))
    return float(max(1, round(exact / dim.divisor)) * dim.divisor)


def size(dim: Dim, choices: Choices) -> int:
    """What a size is under `choices`."""
    return dim if isinstance(dim, int) else int(value(dim, choices))


def ends(dim: Dim, what: str = "size") -> tuple[int, int]:
    """The smallest and the largest that a size can be; refuses one that can't be a size.

    Raises: SpaceError, where an option is no positive number, or is not whole.
    """
    if isinstance(dim, bool) or not isinstance(dim, (int, Decision, Product)):
        raise SpaceError(f"a {what} must be a whole number or a decision, got {dim!r}")
    low: dict[str, Option] = {}
    high: dict[str, Option] = {}
    for decision in decisions(dim):
        numbers = [_number(option, decision.name, what) for option in options(decision)]
        low[decision.name], high[decision.name] = min(numbers), max(numbers)
        if isinstance(dim, Decision) and (isinstance(dim, Real) or any(n % 1 for n in numbers)):
            raise SpaceError(
                f"a {what} must be whole, decision {decision.name!r} is not: use whole options,"
                f" or a product(...) of it"
            )
    smallest, largest = size(dim, low), size(dim, high)
    if smallest < 1:
        raise SpaceError(f"a {what} must be at least 1, got {smallest} from {text(dim)}")
    return smallest, largest


def _number(option: Option, name: str, what: str) -> int | float:
    if isinstance(option, bool) or not isinstance(option, (int, float)) or option <= 0:
        raise SpaceError(
            f"a {what} must be a positive number, decision {name!r} has option {option!r}"
        )
    return option


def text(dim: Dim | float) -> str:
    """A size as people write it: `16`, `width`, `width * expansion`."""
    if isinstance(dim, Product):
        return f"{text(dim.left)} * {text(dim.right)}"
    return dim.name if isinstance(dim, Decision) else str(dim)
