"""Takes over what an earlier study already paid for: its supernet and its latency table."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier.errors import StudyError
from espalier.flows.measuring import timed_here
from espalier.study import Study

if TYPE_CHECKING:
    from espalier.flows.job import Job

_SAME = ("family", "shape", "classes", "space", "data")
_TABLE = "latency table"


def take_over(job: Job, folder: Path, identity: Mapping[str, Any]) -> None:
    """Copies the trained supernet, and the latency table if it was measured on the same machine and runtime.

    The supernet only for the solver "search": relaxation trains its own.

    Raises `StudyError` naming the difference when the other study is of another family or data.
    """
    with Study.open(folder) as other:
        for key in _SAME:
            if other.meta["identity"].get(key) != identity[key]:
                raise StudyError(
                    f"can't reuse {folder}: its {key} is {other.meta['identity'].get(key)!r}, "
                    f"this search's is {identity[key]!r}"
                )
        if timed_here(other) and other.meta["identity"].get("runtime") == identity["runtime"]:
            with suppress(KeyError):  # a study that was stopped before it had a table
                table = other.once(_TABLE, _absent)
                job.study.once(_TABLE, lambda: table)
    for path in folder.glob("supernet.*") if job.solver == "search" else ():
        if not (job.study.folder / path.name).exists():
            shutil.copy2(path, job.study.folder / path.name)
    job.study.event("reuse", folder=str(folder))


def _absent() -> Any:
    raise KeyError(_TABLE)
