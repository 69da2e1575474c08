"""What a shrink of a language model is about, and what of an earlier one is taken over."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from espalier.compress import Cut
from espalier.compress.language.files.folder import Folder
from espalier.errors import StudyError
from espalier.flows.shrink_identity import settings_of
from espalier.problem import Limit
from espalier.study import Study
from espalier.tasks.tokens import TokenText

_SAME = ("model", "space", "cuts", "data", "measure", "seed", "grouped")
_TAKEN = ("windows", "original validation")
_TIMED = ("times", "original times")


def language_identity(
    folder: Folder,
    family: Any,
    task: TokenText,
    asked: Sequence[Limit],
    context: int,
    cuts: Sequence[Cut],
    **more: Any,
) -> dict[str, Any]:
    """What must be the same when a study is resumed."""
    return {
        "model": fingerprint(folder),
        "space": family.space.fingerprint,
        "cuts": [settings_of(cut) for cut in cuts],
        "task": task.name,
        "data": task.fingerprint,
        "limits": [str(x) for x in asked],
        "context": context,
        **more,
    }


def fingerprint(folder: Folder) -> str:
    """A hash of a folder's configuration and weights."""
    digest = hashlib.sha256((folder.path / "config.json").read_bytes())
    for file in folder.weights:
        with open(file, "rb") as opened:
            while part := opened.read(2**24):
                digest.update(part)
    return digest.hexdigest()[:16]


def paid(study: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """What an earlier shrink of the same model recorded that does not depend on limits.

    Errors: `StudyError` where it was of another model, text or kind of decisions.
    """
    with Study.open(study) as other:
        recorded = other.meta["identity"]
        for key in _SAME:
            if recorded.get(key) != json.loads(json.dumps(identity[key])):
                raise StudyError(
                    f"can't reuse {study}: its {key} is {recorded.get(key)!r}, "
                    f"this shrink's is {identity[key]!r}"
                )
        same_length = recorded.get("context") == identity["context"]
        return {
            key: value
            for key, value in other.recorded().items()
            if key in _TAKEN
            or key.startswith(("harm/", "harm of/"))
            or (key.startswith(_TIMED) and same_length)
        }


def nothing_paid(study: Path) -> bool:
    """Whether a study that was refused holds nothing that another could reuse."""
    with Study.open(study) as opened:
        return not any(key.startswith(("harm/", "times")) for key in opened.recorded())
