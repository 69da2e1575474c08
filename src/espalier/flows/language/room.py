"""Whether a model fits in memory, and its answer where it is to go: said before it is loaded."""

from __future__ import annotations

from pathlib import Path

import psutil

from espalier.compress.language.files.folder import Folder
from espalier.compress.language.layer_by_layer.memory import shown
from espalier.errors import EspalierError
from espalier.study.schema import NAME

_HELD = 2  # models at once: the original, and the one that is judged or repaired
_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container, where there is one


def free_memory() -> int:
    """Bytes that this process may still take."""
    free = int(psutil.virtual_memory().available)
    try:
        most = int(_LIMIT.read_text())
    except (OSError, ValueError):  # no container, or "max"
        return free
    return min(free, max(0, most - int(psutil.Process().memory_info().rss)))


def check_room(folder: Folder, held: int = _HELD) -> None:
    """Refuses a model that does not fit in memory, `held` times at once, as it would be loaded.

    Errors: `EspalierError`, with the way that holds one layer at a time.
    """
    whole = folder.bytes_on_disk // folder.stored.itemsize * folder.dtype.itemsize
    if held * whole <= (free := free_memory()):
        return
    raise EspalierError(
        f"{folder.path} takes {shown(whole)} in memory, and a shrink holds {held} such models, "
        f"{shown(held * whole)}; {shown(free)} are free: give --memory {int(0.9 * free / 1e6)}MB, which "
        "goes through it layer by layer under a limit on bytes alone (in Python "
        "espalier.flows.language.shrink_in_layers), or a larger machine"
    )


def check_place(where: Path, folder: Folder) -> None:
    """Refuses to write over a model: the one that is read, or another that no shrink wrote.

    Errors: `EspalierError`.
    """
    rule = "choose another folder to write to"
    if where.resolve() == folder.path.resolve():
        raise EspalierError(f"--out {where} is the model itself: {rule}")
    if (where / "config.json").exists() and not (where / NAME).exists():
        raise EspalierError(f"--out {where} holds a model that no shrink wrote: {rule}")
