"""Images from a folder that holds one folder of image files a class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from espalier.errors import DataError
from espalier.tasks.sources import Images, Indices, Source

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
_GREY = {"L", "1"}


def from_folder(root: Path) -> Source:
    """Classes are the sub-folders' names in alphabetical order; files are read when chosen.

    With the sub-folders `train` and `test`, each of class folders, test is the source's own.
    Errors: `DataError` for a folder without class folders, an empty one, or classes of test that
    train has not.
    """
    parts = _folders(root)
    own_test = set(parts) >= {"train", "test"}
    trains = _folders(root / "train") if own_test else parts
    files, labels = _files(root / "train" if own_test else root, trains)
    test_from = None
    if own_test:
        tests = _folders(root / "test")
        extra = sorted(set(tests) - set(trains))
        if extra:
            raise DataError(f"class folder {extra[0]!r} is in test but not in train, in {root}")
        test_from = len(files)
        more, more_labels = _files(root / "test", trains, set(tests))
        files, labels = files + more, labels + more_labels
    if len(trains) < 2:
        raise DataError(
            f"{str(root)!r} must hold one folder of images for each of two or more classes, "
            f"found {len(trains)}"
        )
    y = np.array(labels, dtype=np.int64)

    def load(indices: Indices, size: int | None) -> Images:
        return read_images([files[i] for i in indices], size)

    return Source(root.name or "folder", y, test_from, load, tuple(trains))


def _folders(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def _files(
    root: Path, names: list[str], present: set[str] | None = None
) -> tuple[list[Path], list[int]]:
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        if present is not None and name not in present:
            continue
        found = sorted(p for p in (root / name).rglob("*") if p.suffix.lower() in _SUFFIXES)
        if not found:
            raise DataError(f"class folder {str(root / name)!r} holds no image file")
        files += found
        labels += [label] * len(found)
    return files, labels


def read_images(files: list[Path], size: int | None) -> Images:
    """Image files as `(n, h, w, c)` uint8: grey where all are, else RGB; `size` squares them.

    Shrinking averages areas. Errors: `DataError` names the file that can't be read, or the first
    whose size differs where no size is given.
    """
    grey = all(_mode(path) in _GREY for path in files)
    out: NDArray[np.uint8] | None = None
    for row, path in enumerate(files):
        pixels = _read(path, "L" if grey else "RGB", size)
        if out is None:
            out = np.empty((len(files), *pixels.shape), dtype=np.uint8)
        if pixels.shape != out.shape[1:]:
            raise DataError(
                f"{str(path)!r} is {pixels.shape[1]}x{pixels.shape[0]} pixels and {files[0].name} is "
                f"{out.shape[2]}x{out.shape[1]}: give a size, so that all are resized to it"
            )
        out[row] = pixels
    if out is None:
        raise DataError("no image files to read")
    return out


def _mode(path: Path) -> str:
    try:
        with Image.open(path) as image:
            return image.mode
    except (OSError, ValueError) as error:
        raise DataError(f"can't read the image file {str(path)!r}: {error}") from error


def _read(path: Path, mode: str, size: int | None) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as image:
            picture: Image.Image = image.convert(mode)
            if size is not None and picture.size != (size, size):
                smaller = size < min(picture.size)
                kind = Image.Resampling.BOX if smaller else Image.Resampling.BILINEAR
                picture = picture.resize((size, size), kind)
            pixels = np.asarray(picture)
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"can't read the image file {str(path)!r}: {error}") from error
    return pixels[..., None] if pixels.ndim == 2 else pixels
