"""Which decisions a shrink makes, as text: `width,bits:8/4,sparsity:2:4`.

Kinds are parted by commas; what a kind is set to follows a colon, several settings parted by slashes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from espalier.compress import Bits, Cut, Depth, Sparsity, Widths
from espalier.errors import EspalierError, unknown
from espalier.export.quantisers import FLOAT
from espalier.flows.shrink_identity import settings_of

_PATTERN = re.compile(r"\d+:\d+")


class _NotASetting(Exception):
    """A setting that its kind does not take."""


@dataclass(frozen=True)
class Kind:
    """A kind of decision as text. `make`: its cut from settings, which may raise `_NotASetting`;
    `tell`: the settings of a cut; `takes`: what the settings are, with an example, for errors."""

    make: Callable[[Sequence[str]], Cut]
    tell: Callable[[Any], list[str]]
    takes: str


def make_cuts(decisions: str | Iterable[str | Cut]) -> tuple[Cut, ...]:
    """Cuts from text, from several texts of one kind each, or as they are.

    Errors: `EspalierError` for an unknown kind or setting, with what there is.
    """
    given = decisions.split(",") if isinstance(decisions, str) else list(decisions)
    found = [item if isinstance(item, Cut) else _cut(item.strip()) for item in given]
    named = [item.strip().partition(":")[0] for item in given if isinstance(item, str)]
    for kind in named:
        if named.count(kind) > 1:
            raise EspalierError(f"{kind} is there twice: join its settings by slashes, {_EXAMPLE}")
    if not found:
        raise EspalierError(f"a shrink needs one kind of decision or more of {', '.join(KINDS)}")
    return tuple(found)


def told(cut: Cut) -> str:
    """The text that makes this cut; '' where only Python can say it."""
    if not isinstance(cut, Widths | Depth | Bits | Sparsity):
        return ""
    text = ":".join(filter(None, [cut.kind, "/".join(KINDS[cut.kind].tell(cut))]))
    same = _cut(text)
    return text if type(same) is type(cut) and settings_of(same) == settings_of(cut) else ""


def _cut(text: str) -> Cut:
    name, colon, rest = text.partition(":")
    if name not in KINDS:
        hint = "" if name.isalpha() or not name else f"; settings follow a colon: {_EXAMPLE}"
        raise EspalierError(unknown("kind of decision", name, KINDS) + hint)
    settings = [one.strip() for one in rest.split("/")] if colon else []
    try:
        return KINDS[name].make(settings)
    except _NotASetting as wrong:
        raise EspalierError(f"{name} takes {KINDS[name].takes}; got {wrong.args[0]!r}") from None


# --- the kinds ---------------------------------------------------------------------------------


def _widths(settings: Sequence[str]) -> Widths:
    read: Mapping[str, Callable[[str], Any]] = {
        "multiple": _whole,
        "steps": _whole,
        "least": _share,
        "importance": str,
        "heads": _yes,
    }
    found = {}
    for one in settings:
        name, equals, value = one.partition("=")
        if name not in read or not equals:
            raise _NotASetting(one)
        try:
            found[name] = read[name](value)
        except _NotASetting:
            raise _NotASetting(one) from None
    return Widths(**found)


def _tell_widths(cut: Widths) -> list[str]:
    usual = Widths()
    names = ("multiple", "steps", "least", "importance")
    out = [f"{n}={getattr(cut, n)}" for n in names if getattr(cut, n) != getattr(usual, n)]
    return [*out, *([] if cut.heads else ["heads=no"])]


def _depth(settings: Sequence[str]) -> Depth:
    for one in settings:
        raise _NotASetting(one)
    return Depth()


def _bits(settings: Sequence[str]) -> Bits:
    numbers = tuple(_whole(one) for one in settings if one != "weights")
    alone = "weights" in settings
    return Bits(numbers, weights_only=alone) if numbers else Bits(weights_only=alone)


def _tell_bits(cut: Bits) -> list[str]:
    options = cut.options if cut.options != Bits().options else ()
    fewer = [str(bits) for bits in reversed(options) if bits < FLOAT]
    return [*(["weights"] if cut.weights_only else []), *fewer]


def _sparsity(settings: Sequence[str]) -> Sparsity:
    if not settings:
        return Sparsity()
    patterns = tuple(one for one in settings if _PATTERN.fullmatch(one))
    return Sparsity(patterns, tuple(_share(one) for one in settings if one not in patterns))


def _tell_sparsity(cut: Sparsity) -> list[str]:
    usual = Sparsity()
    if (cut.patterns, cut.shares) == (usual.patterns, usual.shares):
        return []
    return [*cut.patterns, *(repr(share) for share in cut.shares)]


def _whole(text: str) -> int:
    if not re.fullmatch(r"\d+", text):
        raise _NotASetting(text)
    return int(text)


def _share(text: str) -> float:
    """0.25 or 25%."""
    if not re.fullmatch(r"\d*\.?\d+%?", text):
        raise _NotASetting(text)
    return float(text[:-1]) / 100 if text.endswith("%") else float(text)


def _yes(text: str) -> bool:
    if text not in ("yes", "no"):
        raise _NotASetting(text)
    return text == "yes"


_EXAMPLE = "bits:8/4"
KINDS: Mapping[str, Kind] = {
    "width": Kind(
        _widths,
        _tell_widths,
        "multiple=8, steps=6, least=25%, importance=bn and heads=no, like width:multiple=8/steps=6",
    ),
    "depth": Kind(_depth, lambda cut: [], "no settings on the command line"),
    "bits": Kind(
        _bits,
        _tell_bits,
        "bits to choose from beside float, and 'weights' for those of linear layers alone, like "
        f"{_EXAMPLE} or bits:weights/4",
    ),
    "sparsity": Kind(
        _sparsity,
        _tell_sparsity,
        "patterns N:M and shares of weights kept, like sparsity:2:4/1:4 or sparsity:50%",
    ),
}
