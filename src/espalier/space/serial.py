"""A space as JSON, and its fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from espalier.errors import SpaceError, unknown
from espalier.space.constraints import Constraint, Forbid, Linear
from espalier.space.decisions import Decision, choice, integer, ordinal, real
from espalier.space.layout import Layout

_DECISIONS: dict[str, tuple[set[str], Callable[[Mapping[str, Any]], Decision]]] = {
    "categorical": ({"options"}, lambda d: choice(d["name"], *d["options"], when=d.get("when"))),
    "ordinal": ({"options"}, lambda d: ordinal(d["name"], *d["options"], when=d.get("when"))),
    "integer": (
        {"low", "high"},
        lambda d: integer(d["name"], d["low"], d["high"], when=d.get("when")),
    ),
    "real": (
        {"low", "high", "log"},
        lambda d: real(d["name"], d["low"], d["high"], d["log"], when=d.get("when")),
    ),
}
_CONSTRAINTS: dict[str, tuple[set[str], Callable[[Mapping[str, Any]], Constraint]]] = {
    "linear": (
        {"coefficients", "op", "bound"},
        lambda c: Linear(c["coefficients"], c["op"], c["bound"]),
    ),
    "forbid": ({"options"}, lambda c: Forbid(c["options"])),
}


def to_json(layout: Layout, constraints: Iterable[Constraint]) -> dict[str, Any]:
    """Plain JSON; conditions list their options in the parent's order, so equal means equal."""
    decisions = []
    for d in layout.decisions:
        data = d.to_json()
        if d.when:
            data["when"] = {p: _ordered(layout, p, options) for p, options in d.when.items()}
        decisions.append(data)
    return {"decisions": decisions, "constraints": [c.to_json() for c in constraints]}


def _ordered(layout: Layout, parent: str, options: Iterable[Any]) -> list[Any]:
    d = layout.decisions[layout.index[parent]]
    return [d.option(code) for code in sorted({d.code(o) for o in options})]


def fingerprint(data: Mapping[str, Any]) -> str:
    """16 hex digits of the JSON, the same in every process and on every machine."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read(data: Any) -> tuple[list[Decision], list[Constraint]]:
    """What `to_json` wrote. Errors: `SpaceError` with the part that can't be read."""
    _fields("a space", data, {"decisions"}, {"constraints"})
    decisions = [_part("decision", item, _DECISIONS, {"name"}) for item in _list(data, "decisions")]
    constraints = [
        _part("constraint", item, _CONSTRAINTS, set()) for item in _list(data, "constraints")
    ]
    return decisions, constraints


def _list(data: Mapping[str, Any], name: str) -> Sequence[Any]:
    value = data.get(name, [])
    if not isinstance(value, (list, tuple)):
        raise SpaceError(f"a space's {name!r} is a list, got {value!r}")
    return value


def _fields(what: str, data: Any, needed: set[str], allowed: set[str]) -> None:
    if not isinstance(data, Mapping):
        raise SpaceError(f"{what} is a JSON object, got {data!r}")
    for name in sorted(needed - set(data)):
        raise SpaceError(f"{what} needs the field {name!r}, got {sorted(data)}")
    for name in sorted(set(data) - needed - allowed):
        raise SpaceError(f"{what}: {unknown('field', name, needed | allowed)}")


def _part(what: str, data: Any, kinds: Mapping[str, tuple[set[str], Any]], also: set[str]) -> Any:
    if not isinstance(data, Mapping):
        raise SpaceError(f"a {what} is a JSON object, got {data!r}")
    kind = str(data.get("kind"))
    if kind not in kinds:
        raise SpaceError(unknown(f"kind of {what}", kind, kinds))
    fields, make = kinds[kind]
    _fields(f"a {what}", data, fields | also | {"kind"}, {"when"} if also else set())
    options = data.get("options")
    if isinstance(options, str) or (
        kind in ("categorical", "ordinal") and not isinstance(options, (list, tuple))
    ):
        raise SpaceError(f"a {what}'s options are a list, got {options!r}")
    return make(data)
