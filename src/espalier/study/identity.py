"""What a study is about, compared; and the versions it ran with."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

_SHOWN = 6
_PACKAGES = ("espalier", "torch", "numpy", "onnxruntime")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on, without importing them."""
    out = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            out[name] = "absent"
    return out


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two mappings of JSON, a line a key: "task: 'digits' -> 'mnist'"."""
    before, after = _flat(old), _flat(new)
    keys = list(dict.fromkeys([*before, *after]))
    return [
        f"{key}: {_short(before.get(key, _ABSENT))} -> {_short(after.get(key, _ABSENT))}"
        for key in keys
        if before.get(key, _ABSENT) != after.get(key, _ABSENT)
    ]


def summary(lines: list[str]) -> str:
    """The first few differences in one line."""
    more = f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    return "; ".join(lines[:_SHOWN]) + more


class _Absent:
    def __repr__(self) -> str:
        return "absent"


_ABSENT: Any = _Absent()


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping) and (value or not name):
        items = [(f"{name}.{k}" if name else str(k), v) for k, v in value.items()]
    elif isinstance(value, list) and value:
        items = [(f"{name}[{i}]", v) for i, v in enumerate(value)]
    else:
        return {name: value}
    out: dict[str, Any] = {}
    for key, inner in items:
        out.update(_flat(inner, key))
    return out


def _short(value: Any) -> str:
    text = repr(value) if value is _ABSENT else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 48 else text[:45] + "..."
