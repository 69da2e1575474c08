"""What a shrink of a language model is about, and what of an earlier one is taken over."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from espalier.compress import Cut
from espalier.compress.language.files.folder import Folder
from espalier.flows.paid import Paid
from espalier.flows.shrink_identity import settings_of
from espalier.problem import Limit
from espalier.tasks.tokens import TokenText


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


PAID = Paid(
    same=("model", "space", "cuts", "data", "measure", "seed", "grouped"),
    taken=("windows", "original validation", "harm/", "harm of/"),
    timed=("times", "original times"),
    where="context",
    dear=("harm/", "times"),
)
