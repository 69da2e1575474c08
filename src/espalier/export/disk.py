"""Files are written beside their place and moved in whole: a full disk leaves no half a network."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from espalier.errors import ExportError


@contextlib.contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """A new empty folder inside `folder`, removed on leaving whatever happens.

    Every `OSError` inside (disk full, read-only, no such place) leaves as an `ExportError`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=".export-", dir=folder))
        try:
            yield stage
        finally:
            shutil.rmtree(stage, ignore_errors=True)
    except OSError as error:
        raise ExportError(
            f"can't write to {folder}: {error.strerror or error}; "
            "free some space or choose another folder"
        ) from error


def write(path: Path, data: bytes) -> Path:
    """Writes and flushes to the disk, so that a full one is noticed here."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return path


def settle(stage: Path, folder: Path) -> list[Path]:
    """Moves every file of the stage into the folder, each at once, over what was there.

    The card, which speaks of the others, comes last.
    """
    files = sorted(stage.iterdir(), key=lambda path: (path.suffix == ".json", path.name))
    return [path.replace(folder / path.name) for path in files]
