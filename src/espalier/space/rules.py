"""Constraints on whole arrays: how far each row is from keeping them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from espalier.errors import SpaceError, unknown
from espalier.space.constraints import Constraint, Forbid, Linear
from espalier.space.decisions import Decision, Integer, Ordinal, Real
from espalier.space.layout import Codes, Layout, Mask

Array = NDArray[np.float64]


class Rule(ABC):
    """A constraint bound to columns."""

    columns: tuple[int, ...]
    text: str

    @abstractmethod
    def excess(self, codes: Codes) -> Array:
        """How far `(n,)` each row is beyond the rule, were all its columns active; 0 is kept."""

    def violation(self, codes: Codes, masks: dict[int, Mask]) -> Array:
        """`excess`, and 0 where a column of the rule is inactive."""
        out = self.excess(codes)
        for j in self.columns:
            if j in masks:
                out[~masks[j]] = 0.0
        return out


class LinearRule(Rule):
    """A linear bound; the violation is the excess as a share of the sum's largest swing."""

    def __init__(self, constraint: Linear, layout: Layout) -> None:
        self.columns = tuple(layout.index[n] for n in constraint.names)
        self.text = str(constraint)
        sign = 1.0 if constraint.op == "<=" else -1.0
        self.bound = sign * constraint.bound
        self.terms = []
        scale = abs(constraint.bound)
        for j, c in zip(self.columns, constraint.coefficients.values(), strict=True):
            low, high, table = _values(layout.decisions[j])
            self.terms.append((j, sign * c, low, table))
            scale += abs(c) * max(abs(low), abs(high))
        self.scale = scale or 1.0

    def excess(self, codes: Codes) -> Array:
        """The excess as a share of the largest sum there can be."""
        total = np.full(len(codes), -self.bound)
        for j, coefficient, low, table in self.terms:
            column = codes[:, j]
            if table is None:
                total += coefficient * (column.astype(np.float64) + low)
            else:
                index = np.clip(np.nan_to_num(column), 0, len(table) - 1).astype(np.intp)
                total += coefficient * table[index]
        total /= self.scale
        total[total <= 1e-12] = 0.0
        out: Array = np.nan_to_num(total, nan=1.0)
        return out


class ForbidRule(Rule):
    """A forbidden combination; the violation is 1."""

    def __init__(self, constraint: Forbid, layout: Layout) -> None:
        self.columns = tuple(layout.index[n] for n in constraint.names)
        self.text = str(constraint)
        self.codes = [
            layout.decisions[j].code(option)
            for j, option in zip(self.columns, constraint.options.values(), strict=True)
        ]

    def excess(self, codes: Codes) -> Array:
        """1 where the row has all the options."""
        out = np.ones(len(codes), dtype=np.bool_)
        for j, code in zip(self.columns, self.codes, strict=True):
            out &= codes[:, j] == code
        return out.astype(np.float64)


def _values(decision: Decision) -> tuple[float, float, Array | None]:
    """Lowest and highest value; the table of values where they are listed."""
    if isinstance(decision, Integer):
        return float(decision.low), float(decision.high), None
    if isinstance(decision, Real):
        # a real column holds the value itself: nothing is added
        return 0.0, max(abs(decision.low), abs(decision.high)), None
    table = np.array([float(o) for o in decision.options])
    return float(table.min()), float(table.max()), table


def bind(constraints: Iterable[Constraint], layout: Layout) -> tuple[Rule, ...]:
    """The constraints as rules on columns. Errors: `SpaceError` for what the space lacks."""
    rules: list[Rule] = []
    for constraint in constraints:
        if not isinstance(constraint, (Linear, Forbid)):
            raise SpaceError(f"a constraint is a Linear or a Forbid, got {constraint!r}")
        kind = type(constraint).__name__
        for name in constraint.names:
            if name not in layout.index:
                raise SpaceError(f"{kind}: {unknown('decision', name, layout.names)}")
        try:
            rules.append(_bind(constraint, layout))
        except SpaceError as error:
            raise SpaceError(f"{kind}: {error}") from None
    return tuple(rules)


def _bind(constraint: Linear | Forbid, layout: Layout) -> Rule:
    chosen = [layout.decisions[layout.index[n]] for n in constraint.names]
    if isinstance(constraint, Forbid):
        for d in chosen:
            if isinstance(d, Real):
                raise SpaceError(f"{d.name!r} is real and has no options to forbid; use Linear")
        return ForbidRule(constraint, layout)
    for d in chosen:
        numeric = all(isinstance(o, (int, float)) and not isinstance(o, bool) for o in d.options)
        if not isinstance(d, (Integer, Real)) and not (isinstance(d, Ordinal) and numeric):
            rule = "a sum needs ordinal decisions of numbers, integer or real ones"
            raise SpaceError(f"{rule}, but {d.name!r} is {d.kind} {list(d.options)}")
    return LinearRule(constraint, layout)


def violation(rules: tuple[Rule, ...], codes: Codes, masks: dict[int, Mask]) -> Array:
    """The sum of the violations `(n,)`; 0 where every constraint is kept."""
    total = np.zeros(len(codes))
    for rule in rules:
        total += rule.violation(codes, masks)
    return total
