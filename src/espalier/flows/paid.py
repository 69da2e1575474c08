"""What an earlier shrink of the same model has paid for already, whatever its limits were."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from espalier.errors import StudyError
from espalier.study import Study


@dataclass(frozen=True)
class Paid:
    """Which records of a study another one can take over; records are told by how keys begin.

    `same`: what both identities must agree on. `taken`: records that do not depend on limits.
    `timed`: those that also need the same `where`. `dear`: those that are worth to be kept.
    """

    same: tuple[str, ...]
    taken: tuple[str, ...]
    timed: tuple[str, ...]
    where: str
    dear: tuple[str, ...]

    def of(self, folder: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
        """What the study in a folder recorded that a shrink of this identity can use.

        Errors: `StudyError` where it was of something else.
        """
        with Study.open(folder) as other:
            recorded = other.meta["identity"]
            for key in self.same:
                if recorded.get(key) != json.loads(json.dumps(identity[key])):
                    raise StudyError(
                        f"can't reuse {folder}: its {key} is {recorded.get(key)!r}, "
                        f"this shrink's is {identity[key]!r}"
                    )
            same = recorded.get(self.where) == identity[self.where]
            wanted = (*self.taken, *self.timed) if same else self.taken
            return {k: v for k, v in other.recorded().items() if k.startswith(wanted)}

    def nothing(self, folder: Path) -> bool:
        """Whether a study that was refused holds nothing that another could reuse."""
        with Study.open(folder) as study:
            return not any(key.startswith(self.dear) for key in study.recorded())
