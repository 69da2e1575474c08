"""Images from arrays, .npz files and torch Datasets, checked item by item."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.errors import DataError
from espalier.tasks.sources import Images, Indices, Source, read_npz

_KEYS = "x and y, or x_train, y_train, x_test and y_test"


def from_file(path: Path) -> Source:
    """Images of an .npz file with x and y, or x_train, y_train, x_test and y_test."""
    return from_mapping(read_npz(path), path.stem, f" in {str(path)!r}")


def from_mapping(data: Mapping[str, Any], name: str = "arrays", where: str = "") -> Source:
    """Images of named arrays: x and y, or x_train, y_train, x_test and y_test."""
    keys = set(data)
    if {"x_train", "y_train", "x_test", "y_test"} <= keys:
        x, y = as_images(data["x_train"], "x_train"), as_labels(data["y_train"], "y_train")
        x_test, y_test = as_images(data["x_test"], "x_test"), as_labels(data["y_test"], "y_test")
        _same_length(x, y, "x_train", "y_train")
        _same_length(x_test, y_test, "x_test", "y_test")
        if x.shape[1:] != x_test.shape[1:]:
            raise DataError(
                f"x_train and x_test must hold images of one shape, got {x.shape[1:]} and "
                f"{x_test.shape[1:]}{where}"
            )
        both = np.concatenate([x, x_test.astype(x.dtype)])
        return _source(name, both, np.concatenate([y, y_test]), len(y))
    if {"x", "y"} <= keys:
        x, y = as_images(data["x"], "x"), as_labels(data["y"], "y")
        _same_length(x, y, "x", "y")
        return _source(name, x, y, None)
    raise DataError(
        f"arrays must be named {_KEYS}{where}; found {', '.join(sorted(keys)) or 'none'}"
    )


def from_datasets(train: Any, test: Any, name: str = "datasets") -> Source:
    """Images of two torch Datasets, each item an (image, label) pair; read once, kept in memory."""
    parts: dict[str, Any] = {}
    for part, dataset in (("train", train), ("test", test)):
        parts[f"x_{part}"], parts[f"y_{part}"] = _read(dataset, part)
    return from_mapping(parts, name)


def _read(dataset: Any, part: str) -> tuple[NDArray[Any], NDArray[Any]]:
    xs, ys = [], []
    for i in range(len(dataset)):
        try:
            x, y = dataset[i]
            xs.append(np.asarray(x))
            ys.append(int(y))
        except Exception as error:
            raise DataError(
                f"item {i} of the {part} dataset must be an (image, label) pair: "
                f"{type(error).__name__}: {error}"
            ) from error
        if xs[-1].shape != xs[0].shape:
            raise DataError(
                f"item {i} of the {part} dataset has shape {xs[-1].shape}, the first has "
                f"{xs[0].shape}: resize them to one shape"
            )
    if not xs:
        raise DataError(f"the {part} dataset is empty")
    return np.stack(xs), np.array(ys)


def as_images(value: Any, what: str) -> Images:
    """An array as images `(n, h, w, c)`, uint8 or float32; a view where it can be.

    Takes `(n, h, w)`, `(n, h, w, c)` and `(n, c, h, w)`: the smaller of the second and the last
    axis is the channels (the second where they are equal).
    """
    x = np.asarray(value)
    if x.dtype.kind not in "uifb":
        raise DataError(f"{what} must hold numbers (uint8, integer or float), got dtype {x.dtype}")
    if x.ndim == 3:
        x = x[..., None]
    if x.ndim != 4 or 0 in x.shape:
        raise DataError(
            f"{what} must have shape (n, h, w), (n, h, w, c) or (n, c, h, w), got {x.shape}"
        )
    if x.shape[1] <= x.shape[3]:
        x = x.transpose(0, 2, 3, 1)
    if x.dtype.kind == "f":
        bad = ~np.isfinite(x).all(axis=(1, 2, 3))
        if bad.any():
            raise DataError(
                f"{what}[{int(bad.argmax())}] holds NaN or infinity: remove or mend that item"
            )
        return x.astype(np.float32, copy=False)
    if x.dtype == np.uint8 or (x.min() >= 0 and x.max() <= 255):
        return x.astype(np.uint8, copy=False)
    return x.astype(np.float32)


def as_labels(value: Any, what: str) -> Indices:
    """An array as labels `(n,)` int64, none below 0."""
    y = np.asarray(value)
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.dtype.kind not in "ui" or y.ndim != 1:
        raise DataError(
            f"{what} must be whole-number labels of shape (n,), got {y.dtype} {y.shape}"
        )
    if len(y) and y.min() < 0:
        i = int((y < 0).argmax())
        raise DataError(f"labels must be 0 or more, got {what}[{i}] = {y[i]}")
    return y.astype(np.int64)


def _same_length(x: Images, y: Indices, x_name: str, y_name: str) -> None:
    if len(x) != len(y):
        raise DataError(
            f"{x_name} and {y_name} must be equally long, got {len(x)} images and {len(y)} labels"
        )


def _source(name: str, x: Images, y: Indices, test_from: int | None) -> Source:
    classes = int(y.max()) + 1 if len(y) else 0
    white = 255.0 if x.dtype == np.uint8 else 1.0
    names = tuple(str(i) for i in range(classes))
    return Source(name, y, test_from, lambda i, _: x[i], names, white)
