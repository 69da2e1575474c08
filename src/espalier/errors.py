"""What goes wrong, said in one line: the rule, the value received, the next step."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EspalierError(Exception):
    """Base of every error that a user can cause and mend. Its text is one clear line."""


class SpaceError(EspalierError):
    """A space, a decision or a candidate that breaks the space's rules."""


class BudgetError(EspalierError):
    """A limit that can't be read, or that no candidate can keep."""


class DataError(EspalierError):
    """Data that can't be used: unreadable, wrong shape or dtype, NaN, one class."""


class StudyError(EspalierError):
    """A study folder that can't be opened, written or resumed."""


class ExportError(EspalierError):
    """A network that can't be exported, or whose export does not compute the same."""


class NotInTimeError(EspalierError):
    """A program that found nothing in its time, nor proved that there is nothing."""


class MissingExtra(EspalierError):
    """An optional package is absent; the text holds the command that installs it."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed: pip install 'espalier[{extra}]'")
        self.package, self.extra = package, extra

    def __reduce__(self) -> tuple[type[MissingExtra], tuple[str, str]]:
        return type(self), (self.package, self.extra)  # it travels between processes


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name closest to `name` in spelling, or '' when none is close."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return found[0] if found else ""


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """One line for an unknown name: what it is not, the nearest, and what there is."""
    names = sorted(known)
    near = nearest(name, names)
    hint = f" Did you mean {near!r}?" if near else ""
    return f"unknown {kind} {name!r}.{hint} Known: {', '.join(names)}"
