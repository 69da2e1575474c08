"""Writes the report of a result into a folder, each file whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from espalier.errors import StudyError
from espalier.report.markdown import markdown
from espalier.report.page import page
from espalier.report.reading import Result, plain
from espalier.report.still import still


def write(result: Mapping[str, Any], folder: str | Path) -> dict[str, Path]:
    """Writes `report.html`, `report.md`, `result.json` and, with matplotlib, `front.svg`.

    `result` is the JSON of a search; any section may be absent. The page holds everything it
    needs and loads nothing. Gives the paths by "html", "markdown", "json" (and "figure").
    Raises `StudyError` when the folder can't be written; files that were there stay as they were.
    """
    where = Path(folder)
    read = Result(result)
    read.files = {kind: _within(where, path) for kind, path in read.files.items()}
    drawn = still(read)
    texts: dict[str, tuple[str, bytes]] = {
        "html": ("report.html", page(read).encode()),
        "markdown": ("report.md", markdown(read, "front.svg" if drawn else "").encode()),
        "json": ("result.json", _json(result).encode()),
    }
    if drawn:
        texts["figure"] = ("front.svg", drawn)
    return {kind: put(where / name, data) for kind, (name, data) in texts.items()}


def _within(folder: Path, path: Any) -> str:
    """A file's path as seen from the report's folder, where it lies inside."""
    try:
        return str(Path(str(path)).resolve().relative_to(folder.resolve()))
    except ValueError:
        return str(path)


def _json(result: Mapping[str, Any]) -> str:
    return json.dumps(plain(result), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def put(path: Path, data: bytes) -> Path:
    """Writes beside the target and renames, so a full disk leaves the old file whole.

    Errors: `StudyError` where it can't be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        reason = error.strerror or error
        raise StudyError(
            f"can't write the report to {path}: {reason}; free space or name another folder"
        ) from error
    return path
