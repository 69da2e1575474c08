"""The four kinds of decision: categorical, ordinal, integer and real.

A discrete decision's code is the index of its option; a real one's code is its value.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from espalier.errors import SpaceError
from espalier.space.frozen import FrozenMap
from espalier.space.options import Option, key, name_of, no_option, number, plain

When = Mapping[str, tuple[Option, ...]]


@dataclass(frozen=True)
class Decision(ABC):
    """One named thing to decide.

    `when` maps other decisions to the options under which this one is active; several must all
    hold. A decision whose parent is inactive is inactive.
    """

    name: str
    when: When = field(default=FrozenMap(), kw_only=True)
    kind: ClassVar[str] = ""

    def __post_init__(self) -> None:
        name_of(self.name, "decision")
        object.__setattr__(self, "when", _when(self.name, self.when))

    @property
    @abstractmethod
    def options(self) -> Sequence[Option]:
        """The options in order; empty for a real decision."""

    @property
    def count(self) -> int:
        """How many options there are; 0 for a real decision."""
        return len(self.options)

    @abstractmethod
    def code(self, option: Any) -> float:
        """The code of an option. Errors: `SpaceError` when there is no such option."""

    @abstractmethod
    def option(self, code: float) -> Option:
        """The option of a code within range."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Kind, name and options; `when` is written by the space, which knows the parents."""


@dataclass(frozen=True)
class _Listed(Decision):
    """A decision whose options are listed."""

    options: tuple[Option, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        where = f"decision {self.name!r}"
        if isinstance(self.options, str) or not isinstance(self.options, Iterable):
            raise SpaceError(f"{where}: options are a sequence, got {self.options!r}")
        options = tuple(plain(o, where) for o in self.options)
        if not options:
            raise SpaceError(f"{where} needs at least one option, got none")
        index: dict[tuple[bool, Option], int] = {}
        for i, option in enumerate(options):
            if key(option) in index:
                raise SpaceError(f"{where}: options must differ, got {option!r} twice")
            index[key(option)] = i
        object.__setattr__(self, "options", options)
        object.__setattr__(self, "_index", index)

    def code(self, option: Any) -> float:
        """The index of an option. Errors: `SpaceError` when there is no such option."""
        index: dict[tuple[bool, Option], int] = self._index  # type: ignore[attr-defined]
        if isinstance(option, np.generic):
            option = option.item()
        try:
            return index[key(option)]
        except (KeyError, TypeError):
            raise SpaceError(no_option(self.name, option, self.options)) from None

    def option(self, code: float) -> Option:
        """The option at an index."""
        return self.options[int(code)]

    def to_json(self) -> dict[str, Any]:
        """Kind, name, options."""
        return {"kind": self.kind, "name": self.name, "options": list(self.options)}


@dataclass(frozen=True)
class Categorical(_Listed):
    """Options without an order."""

    kind: ClassVar[str] = "categorical"


@dataclass(frozen=True)
class Ordinal(_Listed):
    """Options in the order given, from small to large."""

    kind: ClassVar[str] = "ordinal"


@dataclass(frozen=True)
class Integer(Decision):
    """Every whole number from `low` to `high`, both included."""

    low: int = 0
    high: int = 0
    kind: ClassVar[str] = "integer"

    def __post_init__(self) -> None:
        super().__post_init__()
        for end in ("low", "high"):
            value = number(getattr(self, end), f"decision {self.name!r}: {end}")
            if value != int(value) or abs(value) > 2**52:
                rule = f"decision {self.name!r}: {end} must be a whole number up to 2^52"
                raise SpaceError(f"{rule}, got {value!r}")
            object.__setattr__(self, end, int(value))
        if self.low > self.high:
            rule = f"decision {self.name!r}: low must not exceed high"
            raise SpaceError(f"{rule}, got {self.low} to {self.high}")

    @property
    def options(self) -> range:
        """The numbers, as a range."""
        return range(self.low, self.high + 1)

    def code(self, option: Any) -> float:
        """How far the number is above `low`. Errors: `SpaceError` when it is out of range."""
        value = plain(option, f"decision {self.name!r}")
        if isinstance(value, (bool, str)) or not self.low <= value <= self.high or value % 1:
            rule = f"{self.name!r} must be a whole number from {self.low} to {self.high}"
            raise SpaceError(f"{rule}, got {option!r}")
        return int(value) - self.low

    def option(self, code: float) -> Option:
        """The number at an index."""
        return self.low + int(code)

    def to_json(self) -> dict[str, Any]:
        """Kind, name, low, high."""
        return {"kind": self.kind, "name": self.name, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Real(Decision):
    """Any number from `low` to `high`; with `log`, sampled evenly in its logarithm."""

    low: float = 0.0
    high: float = 1.0
    log: bool = False
    kind: ClassVar[str] = "real"

    def __post_init__(self) -> None:
        super().__post_init__()
        where = f"decision {self.name!r}"
        for end in ("low", "high"):
            # + 0.0 turns a negative zero into zero, so that equal values have equal bits
            value = number(getattr(self, end), f"{where}: {end}") + 0.0
            object.__setattr__(self, end, value)
        if not self.low < self.high:
            raise SpaceError(f"{where}: low must be below high, got {self.low:g} to {self.high:g}")
        if not math.isfinite(self.high - self.low):
            raise SpaceError(
                f"{where}: high - low must be finite, got {self.low:g} to {self.high:g}"
            )
        if self.log and self.low <= 0:
            raise SpaceError(f"{where}: a log range must be above 0, got low {self.low:g}")

    @property
    def options(self) -> tuple[Option, ...]:
        """Empty: a real decision has no list of options."""
        return ()

    def code(self, option: Any) -> float:
        """The value itself. Errors: `SpaceError` when it is out of range."""
        value = plain(option, f"decision {self.name!r}")
        if isinstance(value, (bool, str)) or not self.low <= value <= self.high:
            rule = f"{self.name!r} must be a number from {self.low:g} to {self.high:g}"
            raise SpaceError(f"{rule}, got {option!r}")
        return float(value) + 0.0

    def option(self, code: float) -> Option:
        """The value itself."""
        return float(code)

    def to_json(self) -> dict[str, Any]:
        """Kind, name, low, high, log."""
        ends = {"low": self.low, "high": self.high, "log": bool(self.log)}
        return {"kind": self.kind, "name": self.name, **ends}


def _when(name: str, when: Any) -> FrozenMap[tuple[Option, ...]]:
    where = f"decision {name!r}: when"
    if not isinstance(when, Mapping):
        rule = f"{where} maps decisions to their options, like {{'depth': (2, 3)}}"
        raise SpaceError(f"{rule}, got {when!r}")
    out = {}
    for parent, allowed in when.items():
        name_of(parent, "decision")
        single = isinstance(allowed, str) or not isinstance(allowed, Iterable)
        options = tuple(plain(o, where) for o in ((allowed,) if single else allowed))
        if not options:
            raise SpaceError(f"{where}: {parent!r} needs at least one option, got none")
        out[parent] = options
    return FrozenMap(out)


def choice(name: str, *options: Option, when: Mapping[str, Any] | None = None) -> Categorical:
    """A categorical decision: `choice("kernel", 3, 5, 7)`."""
    return Categorical(name, options, when=when or {})


def ordinal(name: str, *options: Option, when: Mapping[str, Any] | None = None) -> Ordinal:
    """An ordinal decision, options from small to large: `ordinal("width", 16, 32, 64)`."""
    return Ordinal(name, options, when=when or {})


def integer(name: str, low: int, high: int, when: Mapping[str, Any] | None = None) -> Integer:
    """Whole numbers from low to high, both included: `integer("depth", 1, 4)`."""
    return Integer(name, low, high, when=when or {})


def real(
    name: str, low: float, high: float, log: bool = False, when: Mapping[str, Any] | None = None
) -> Real:
    """Numbers from low to high: `real("dropout", 0, 0.5)`."""
    return Real(name, low, high, log, when=when or {})
