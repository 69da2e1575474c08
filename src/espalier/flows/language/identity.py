"""What a shrink of a language model is about, and what of an earlier one is taken over."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from espalier.compress import Cut
from espalier.compress.language.files.folder import Folder
from espalier.errors import StudyError
from espalier.flows.paid import Paid, other_decisions, plain
from espalier.flows.shrink_identity import settings_of
from espalier.problem import Limit
from espalier.space import Space
from espalier.study import Study
from espalier.tasks.tokens import TokenText


def language_identity(
    folder: Folder,
    family: Any,
    task: TokenText,
    asked: Sequence[Limit],
    context: int,
    cuts: Sequence[Cut],
    threads: int = 1,
    **more: Any,
) -> dict[str, Any]:
    """What must be the same when a study is resumed."""
    if threads != 1:  # not told where it is one: earlier studies say nothing of it
        more["threads"] = threads
    return {
        "model": fingerprint(folder),
        "space": family.space.fingerprint,
        "cuts": [settings_of(cut) for cut in cuts],
        "task": task.name,
        "data": task.fingerprint,
        "limits": [x.exact() for x in asked],
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


@dataclass(frozen=True)
class PaidByKind(Paid):
    """Also of a study with other decisions: what an option alone harms hangs on its own kind only."""

    def of_space(self, folder: Path, identity: Mapping[str, Any], space: Space) -> dict[str, Any]:
        """What the study in a folder recorded that a shrink of this identity and space can use.

        Errors: `StudyError` where it was of something else, or has no kind of decision in common.
        """
        now = plain(identity)
        with Study.open(folder) as other:
            then, records = other.meta["identity"], other.recorded()
        if (then.get("space"), then.get("cuts")) == (now["space"], now["cuts"]):
            return self.of(folder, identity)
        self.check(folder, then, identity)
        shared = {cut["kind"] for cut in now["cuts"] if cut in then.get("cuts", ())}
        if not shared:
            raise StudyError(f"can't reuse {folder}: {other_decisions(then, now)}")
        found = {k: v for k, v in records.items() if k.startswith(_WHOLE)}
        before = f"{_HARM}{then['space']}:"
        for key, value in records.items():
            rest = key.removeprefix(before)
            if rest != key and _fits(rest.split(":", 2)[2], value["harm"], shared, space):
                found[f"{_HARM}{now['space']}:{rest}"] = value
        return found


def _fits(name: str, harm: Sequence[Any], shared: set[str], space: Space) -> bool:
    """Whether harm that was recorded under a name is that of a decision of this space."""
    if name == "original":
        return True
    own = name.removeprefix("before ")
    count = 1 if own != name else space[own].count - 1 if own in space.names else 0
    return own in space.names and _kind(own) in shared and len(harm) == count


def _kind(name: str) -> str:
    """The kind of the cut that a decision is of."""
    kind, _, place = name.partition(":")
    if kind == "window":  # which heads or units stay, where their number is decided
        return place.rpartition(".")[2]
    return "sublayer" if kind in ("attention", "feed") else kind


_HARM = "harm/harm:"  # then come the space, the measure, the windows, and the decision
_WHOLE = ("windows", "original validation")  # what hangs on no decision
PAID = PaidByKind(
    same=("model", "data", "measure", "seed", "grouped"),
    taken=("windows", "original validation", "harm/", "harm of/"),
    timed=("times", "original times"),
    where=("context", "threads"),
    dear=("harm/", "times"),
)
