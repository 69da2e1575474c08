"""What an earlier shrink of the same model has paid for already, whatever its limits were."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from espalier.errors import StudyError
from espalier.flows.measuring import timed_here
from espalier.study import Study

_ANOTHER = {
    "model": "it shrank another model",
    "data": "it saw other data (another file, or other sizes of it)",
}


@dataclass(frozen=True)
class Paid:
    """Which records of a study another one can take over; records are told by how keys begin.

    `same`: what both identities must agree on. `taken`: records that do not depend on limits.
    `timed`: those that also need the same `where`, and machine. `dear`: those that are worth to be kept.
    """

    same: tuple[str, ...]
    taken: tuple[str, ...]
    timed: tuple[str, ...]
    where: str | tuple[str, ...]
    dear: tuple[str, ...]

    def of(self, folder: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
        """What the study in a folder recorded that a shrink of this identity can use.

        Errors: `StudyError` where it was of something else.
        """
        with Study.open(folder) as other:
            recorded = other.meta["identity"]
            self.check(folder, recorded, identity)
            places = (self.where,) if isinstance(self.where, str) else self.where
            same = timed_here(other) and all(recorded.get(k) == identity.get(k) for k in places)
            wanted = (*self.taken, *self.timed) if same else self.taken
            return {k: v for k, v in other.recorded().items() if k.startswith(wanted)}

    def check(self, folder: Path, then: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
        """Refuses the study of another identity in words. Errors: `StudyError`."""
        now = plain(identity)
        for key in self.same:
            if then.get(key) == now[key]:
                continue
            told = f"its {key} is {then.get(key)!r}, this shrink's is {now[key]!r}"
            if key in ("space", "cuts"):
                told = other_decisions(then, now)
            raise StudyError(f"can't reuse {folder}: {_ANOTHER.get(key, told)}")

    def nothing(self, folder: Path) -> bool:
        """Whether a study that was refused holds nothing that another could reuse."""
        with Study.open(folder) as study:
            return not any(key.startswith(self.dear) for key in study.recorded())


def other_decisions(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """How the decisions of two identities differ, in kinds."""
    before, after = (", ".join(cut["kind"] for cut in of.get("cuts", ())) for of in (then, now))
    if before == after:
        return f"it decided {after} with other settings"
    return f"it decided {before}; this shrink decides {after}"


def plain(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity as a study gives it back."""
    found: dict[str, Any] = json.loads(json.dumps(identity))
    return found
