"""Where images come from: labels first, so that only the chosen images are ever decoded."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.errors import DataError

Images = NDArray[Any]  # (n, h, w, c), uint8 or float32
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Source:
    """Labelled images, loaded when asked.

    `labels` `(n,)`; examples from `test_from` on are the source's own test set (None: none).
    `load(indices, size)` gives images `(len(indices), h, w, c)`, uint8 or float32; a source that
    does not resize ignores `size`. `white` is the brightest value of a pixel; `flip` says whether a
    mirrored image is still of its class.
    """

    name: str
    labels: Indices
    test_from: int | None
    load: Callable[[Indices, int | None], Images]
    class_names: tuple[str, ...]
    white: float = 255.0
    flip: bool = True


def digits() -> Source:
    """Handwritten digits of scikit-learn: 1,797 images of 8x8, values 0..16."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = data.images.astype(np.uint8)[..., None]
    labels = data.target.astype(np.int64)
    names = tuple(str(i) for i in range(10))
    return Source("digits", labels, None, lambda i, _: x[i], names, white=16.0, flip=False)


def mnist() -> Source:
    """MNIST (LeCun et al., 1998) from ESPALIER_DATA: 70,000 images of 28x28, 0..255."""
    data = read_npz(data_file("mnist", "mnist.npz"))
    x = np.concatenate([data["x_train"], data["x_test"]])[..., None]
    labels = np.concatenate([data["y_train"], data["y_test"]]).astype(np.int64)
    names = tuple(str(i) for i in range(10))
    start = len(data["y_train"])
    return Source("mnist", labels, start, lambda i, _: x[i], names, flip=False)


_CIFAR10 = [
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
]


def cifar10() -> Source:
    """CIFAR-10 (Krizhevsky, 2009) from ESPALIER_DATA, stored as JPEG: 60,000 of 32x32x3."""
    data = read_npz(data_file("cifar10", "cifar10_jpeg.npz"))
    labels = np.concatenate([data["train_label"], data["test_label"]]).astype(np.int64)
    start = len(data["train_label"])

    def load(indices: Indices, size: int | None) -> Images:
        out = np.empty((len(indices), 32, 32, 3), dtype=np.uint8)
        for row, i in enumerate(indices):
            part, j = ("train", i) if i < start else ("test", i - start)
            low, high = data[f"{part}_offset"][j : j + 2]
            out[row] = _decode(data[f"{part}_jpeg"][low:high].tobytes(), f"cifar10 {part} {j}")
        return out

    return Source("cifar10", labels, start, load, tuple(_CIFAR10))


NAMED: dict[str, Callable[[], Source]] = {"digits": digits, "mnist": mnist, "cifar10": cifar10}


def _decode(data: bytes, what: str) -> NDArray[np.uint8]:
    from PIL import Image

    try:
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    except OSError as error:
        raise DataError(f"can't decode image {what}: {error}") from error


_KEYS = {
    "mnist.npz": "x_train, y_train, x_test, y_test (images uint8 (n, 28, 28))",
    "cifar10_jpeg.npz": "train_jpeg (all JPEG bytes), train_offset (n + 1), train_label, and "
    "test_jpeg, test_offset, test_label",
}


def data_file(folder: str, name: str) -> Path:
    """A file of the data folder that ESPALIER_DATA names. Errors: `DataError` says what to put."""
    root = os.environ.get("ESPALIER_DATA", "")
    wanted = f"{folder}/{name} with the arrays {_KEYS[name]}"
    if not root:
        raise DataError(
            f"the data of {folder!r} are not embedded: set ESPALIER_DATA to a folder that holds "
            f"{wanted}"
        )
    path = Path(root).expanduser() / folder / name
    if not path.is_file():
        raise DataError(f"no file {str(path)!r}: the folder of ESPALIER_DATA must hold {wanted}")
    return path


def read_npz(path: Path) -> dict[str, NDArray[Any]]:
    """Every array of an .npz file, nothing unpickled. Errors: `DataError` names the file."""
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise ValueError("it is a single array, not an .npz archive")
        with file:
            return {key: file[key] for key in file.files}
    except FileNotFoundError as error:
        raise DataError(f"no file {str(path)!r}") from error
    except Exception as error:  # zipfile, zlib and numpy each raise their own
        raise DataError(f"can't read {str(path)!r} as an .npz of plain arrays: {error}") from error
