"""Tasks by name, as written on a command line: "cifar10:size=16,train=4000"."""

from __future__ import annotations

import re
from pathlib import Path

from espalier.errors import DataError, unknown
from espalier.tasks.images import ImageTask, images
from espalier.tasks.sources import NAMED

TASKS: tuple[str, ...] = tuple(sorted(NAMED))
_OPTIONS = ("size", "train", "validation", "test", "seed")
_TAIL = re.compile(r"^(?P<head>.+?):(?P<tail>[^:/\\]*=[^:/\\]*)$")


def make(text: str, seed: int = 0) -> ImageTask:
    """The task that a line names: a known name, a folder of class folders or an .npz file.

    Options follow a colon: size (pixels a side), train, validation, test (examples), seed.
    Errors: `DataError` for an unknown task or option (the nearest is named) or unusable data.
    """
    match = _TAIL.match(text.strip())
    head, tail = (match["head"], match["tail"]) if match else (text.strip(), "")
    if head not in NAMED and not Path(head).expanduser().exists():
        looks_like_path = any(mark in head for mark in ("/", "\\", ".npz"))
        if looks_like_path:
            raise DataError(
                f"no file or folder {head!r}: give a folder of class folders or an .npz"
            )
        raise DataError(unknown("task", head, NAMED) + ", or a path to a folder or an .npz")
    options = {"seed": seed, **_options(tail)}
    made = images(head, **options)  # type: ignore[arg-type]  # every option is a whole number
    made.text = text.strip()
    return made


def _options(tail: str) -> dict[str, int]:
    out: dict[str, int] = {}
    for part in filter(None, (p.strip() for p in tail.split(","))):
        key, _, value = (p.strip() for p in part.partition("="))
        if key not in _OPTIONS:
            raise DataError(unknown("task option", key, _OPTIONS))
        if not value.isdigit():
            raise DataError(f"task option {key} must be a whole number, got {value!r}")
        out[key] = int(value)
    return out
