"""What an option of a decision may be, and how it is checked and written."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from espalier.errors import SpaceError, unknown

Option = str | int | float | bool


def plain(value: Any, where: str) -> Option:
    """`value` as a plain Python option. Errors: `SpaceError` for another type, NaN or infinity."""
    if isinstance(value, np.generic):
        value = value.item()
    if not isinstance(value, (str, int, float)):
        raise SpaceError(f"{where}: an option is a str, int, float or bool, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise SpaceError(f"{where}: an option must be finite, got {value!r}")
    return value


def key(option: Option) -> tuple[bool, Option]:
    """Tells True from 1, which Python holds equal; 16 and 16.0 stay the same option."""
    return isinstance(option, bool), option


def number(value: Any, where: str) -> float:
    """`value` as a finite float. Errors: `SpaceError`."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise SpaceError(f"{where} must be a finite number, got {value!r}")
    return float(value)


def name_of(value: Any, kind: str) -> str:
    """`value` as a name. Errors: `SpaceError` when it is empty or holds a space or '='."""
    if not isinstance(value, str) or not value or "=" in value or any(c.isspace() for c in value):
        raise SpaceError(f"a {kind}'s name is a word without spaces and '=', got {value!r}")
    return value


def no_option(name: str, value: Any, options: Iterable[Option]) -> str:
    """One line for an option that decision `name` does not have, with the nearest."""
    known = list(options)
    if isinstance(value, str):
        return unknown(f"option of {name!r}", value, [str(o) for o in known])
    numbers = [o for o in known if isinstance(o, (int, float)) and not isinstance(o, bool)]
    hint = ""
    if numbers and isinstance(value, (int, float)) and math.isfinite(value):
        hint = f" Nearest: {min(numbers, key=lambda o: abs(o - value))!r}."
    shown = ", ".join(repr(o) for o in known[:12]) + (", ..." if len(known) > 12 else "")
    return f"unknown option of {name!r} {value!r}.{hint} Known: {shown}"
