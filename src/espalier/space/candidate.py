"""A candidate: the options of the active decisions, at the border where codes become networks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from espalier.errors import SpaceError
from espalier.space.options import Option, name_of, plain


class Candidate(Mapping[str, Option]):
    """One option for each active decision; frozen, hashable, plain JSON.

    Its order is that of the names. It knows no space: `Space.candidate` checks it against one.
    """

    __slots__ = ("_options", "_text")

    def __init__(self, options: Mapping[str, Any]) -> None:
        if not isinstance(options, Mapping):
            raise SpaceError(f"a candidate maps decisions to options, got {options!r}")
        self._options: dict[str, Option] = {
            name: plain(options[name_of(name, "decision")], f"candidate, {name!r}")
            for name in sorted(options, key=str)
        }
        self._text: str | None = None

    @classmethod
    def _of(cls, options: dict[str, Option]) -> Candidate:
        """Trusts `options` to be plain and sorted: the fast way from decoded codes."""
        out = cls.__new__(cls)
        out._options = options
        out._text = None
        return out

    @property
    def text(self) -> str:
        """Canonical JSON: equal for equal candidates, and only for them."""
        if self._text is None:
            # a whole float is written as an integer: 16 and 16.0 are one option
            items = {
                k: int(v) if isinstance(v, float) and v.is_integer() else v
                for k, v in self._options.items()
            }
            self._text = json.dumps(items, separators=(",", ":"))
        return self._text

    @property
    def id(self) -> str:
        """12 hex digits, the same in every process and on every machine."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:12]

    def to_json(self) -> dict[str, Option]:
        """A plain dict, decision to option."""
        return dict(self._options)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Candidate:
        """The candidate that `to_json` wrote. Errors: `SpaceError`."""
        return cls(data)

    def __getitem__(self, name: str) -> Option:
        return self._options[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._options)

    def __len__(self) -> int:
        return len(self._options)

    def __hash__(self) -> int:
        return hash(self.text)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Candidate):
            return self.text == other.text
        return self._options == other

    def __reduce__(self) -> tuple[Any, ...]:
        return Candidate, (dict(self._options),)

    def __str__(self) -> str:
        return " ".join(f"{name}={_show(option)}" for name, option in self._options.items())

    def __repr__(self) -> str:
        return f"Candidate({self._options})"


def _show(option: Option) -> str:
    return f"{option:g}" if isinstance(option, float) else str(option)
