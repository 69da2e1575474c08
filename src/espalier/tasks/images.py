"""Image classification from any source, in memory, in three disjoint stratified splits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from espalier.errors import DataError, unknown
from espalier.problem import Metric
from espalier.tasks import arrays, folders
from espalier.tasks.augment import random_crop, random_flip
from espalier.tasks.sources import NAMED, Images, Source
from espalier.tasks.split import Counts, split
from espalier.tasks.task import Split
from espalier.tasks.tensors import SPLITS, TensorTask

_RESIZE_AT_ONCE = 4096
# Measured on digits, 8x8: shifts by one pixel cost small networks half a point of accuracy.
_LEAST_TO_SHIFT = 12


class ImageTask(TensorTask):
    """Classify images; what `images` returns.

    Inputs are normalised: `(pixels / white - mean) / std`, per channel, with the statistics of
    train; see `normalisation`. Augmentation shifts by up to `shift` pixels each way, an eighth of the
    height (nothing under 12 pixels, where one pixel is much), and mirrors where `flip`. Metrics: accuracy (share of 0..1) and loss (cross entropy, nats).
    """

    metrics = (
        Metric("accuracy", goal="max", how="measured"),
        Metric("loss", unit="nats", goal="min", how="measured"),
    )

    def __init__(
        self,
        splits: Mapping[Split, tuple[Tensor, Tensor]],
        class_names: tuple[str, ...],
        name: str = "images",
        white: float = 255.0,
        flip: bool = False,
    ) -> None:
        super().__init__(splits, len(class_names), name)
        self.class_names, self.white, self.flip = class_names, white, flip
        height, width, channels = self.shape
        self.shape = (channels, height, width)
        self.shift = height // 8 if height >= _LEAST_TO_SHIFT else 0
        self.mean, self.std = _statistics(self._splits["train"][0], white)

    @property
    def normalisation(self) -> dict[str, Any]:
        """What a user of the network must do to pixels: divide by white, subtract, divide."""
        return {"white": self.white, "mean": self.mean.tolist(), "std": self.std.tolist()}

    def prepare(self, inputs: Tensor, generator: torch.Generator | None, augment: bool) -> Tensor:
        """Stored pixels `(b, h, w, c)` as normalised, maybe augmented, `(b, c, h, w)`."""
        if augment:
            if self.shift:
                inputs = random_crop(inputs, self.shift, generator)
            if self.flip:
                inputs = random_flip(inputs, generator)
        scale = 1.0 / (self.white * self.std)
        x = inputs.float().mul_(scale).sub_(self.mean / self.std)
        return x.permute(0, 3, 1, 2)  # channels last in memory

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy of logits `(b, classes)` and labels `(b,)`."""
        return functional.cross_entropy(outputs, targets)

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Accuracy and mean cross entropy over a split."""
        right = int((outputs.argmax(dim=1) == targets).sum())
        return {"accuracy": right / len(targets), "loss": float(self.loss(outputs, targets))}

    def _settings(self) -> str:
        return f"{self.class_names} {self.white} {self.flip} {self.normalisation}"


def images(
    source: Any,
    size: int | None = None,
    train: int | None = None,
    validation: int | None = None,
    test: int | None = None,
    seed: int = 0,
    name: str | None = None,
) -> ImageTask:
    """Image classification from a source, split by `seed`, each class in proportion.

    `source`: "digits", "mnist" or "cifar10"; a path to a folder of class folders or to an .npz; a
    pair (x, y) of arrays; a mapping of arrays (x, y or x_train, y_train, x_test, y_test); or a pair
    (train, test) of torch Datasets. `size`: pixels a side, shrunk by averaging areas. `train`,
    `validation`, `test`: how many examples. A source with a test set of its own keeps it apart.
    Errors: `DataError` with the item at fault and what was expected.
    """
    if size is not None and size < 1:
        raise DataError(f"size must be 1 pixel or more, got {size}")
    found = open_source(source)
    _check_labels(found)
    rows = split(
        found.labels, len(found.class_names), found.test_from, Counts(train, validation, test), seed
    )
    order = np.concatenate([rows[s] for s in SPLITS])
    pixels = _resized(_checked(found.load(order, size), found), size)
    ends = np.cumsum([len(rows[s]) for s in SPLITS])[:-1]
    parts = dict(zip(SPLITS, np.split(np.arange(len(order)), ends), strict=True))
    labels = torch.from_numpy(found.labels[order])
    tensors: dict[Split, tuple[Tensor, Tensor]] = {
        s: (pixels[int(i[0]) : int(i[-1]) + 1], labels[int(i[0]) : int(i[-1]) + 1])
        for s, i in parts.items()
    }
    return ImageTask(tensors, found.class_names, name or found.name, found.white, found.flip)


def open_source(source: Any) -> Source:
    """The source behind any of the forms that `images` takes."""
    if isinstance(source, str) and source in NAMED:
        return NAMED[source]()
    if isinstance(source, (str, Path)):
        path = Path(source).expanduser()
        if path.is_dir():
            return folders.from_folder(path)
        if path.is_file():
            return arrays.from_file(path)
        if isinstance(source, str) and not any(mark in source for mark in ("/", "\\", ".npz")):
            raise DataError(unknown("task", source, NAMED) + ", or a path to a folder or an .npz")
        raise DataError(
            f"no file or folder {str(source)!r}: give a folder of class folders or an .npz"
        )
    if isinstance(source, Mapping):
        return arrays.from_mapping(source)
    if isinstance(source, (tuple, list)) and len(source) == 2:
        if any(isinstance(part, Dataset) for part in source):
            return arrays.from_datasets(*source)
        return arrays.from_mapping({"x": source[0], "y": source[1]})
    raise DataError(
        "images come from a name, a path, (x, y) arrays, a mapping of arrays or a pair of torch "
        f"Datasets, got {type(source).__name__}"
    )


def _check_labels(source: Source) -> None:
    """At least two classes, and enough of each to stand in every split."""
    labels, classes = source.labels, len(source.class_names)
    end = len(labels) if source.test_from is None else source.test_from
    present = np.bincount(labels[:end], minlength=classes)
    if np.count_nonzero(present) < 2:
        raise DataError(
            f"classification needs two classes or more, got {np.count_nonzero(present)} in "
            f"{end} examples of {source.name!r}"
        )
    own_test = source.test_from is not None
    needed = 2 if own_test else 3
    if present.min() < needed:
        label = int(present.argmin())
        splits = "train and validation" if own_test else "train, validation and test"
        raise DataError(
            f"class {source.class_names[label]!r} has {present[label]} examples, but labels run "
            f"0..{classes - 1} and each class needs {needed} or more, one for each of {splits}"
        )


def _checked(pixels: Images, source: Source) -> Images:
    if pixels.ndim != 4 or pixels.dtype not in (np.uint8, np.float32):
        raise DataError(
            f"the images of {source.name!r} must be (n, h, w, c) uint8 or float32, "
            f"got {pixels.shape} {pixels.dtype}"
        )
    return pixels


def _resized(pixels: Images, size: int | None) -> Tensor:
    """Pixels as a tensor `(n, size, size, c)`: areas averaged to shrink, bilinear to enlarge."""
    x = torch.from_numpy(np.ascontiguousarray(pixels))
    if size is None or tuple(x.shape[1:3]) == (size, size):
        return x
    shrink = size <= min(x.shape[1:3])
    parts = []
    for low in range(0, len(x), _RESIZE_AT_ONCE):
        planes = x[low : low + _RESIZE_AT_ONCE].permute(0, 3, 1, 2).float()
        if shrink:
            planes = functional.interpolate(planes, size=(size, size), mode="area")
        else:
            planes = functional.interpolate(planes, size=(size, size), mode="bilinear")
        planes = planes.permute(0, 2, 3, 1)
        parts.append(planes.round().to(torch.uint8) if x.dtype == torch.uint8 else planes)
    return torch.cat(parts).contiguous()


def _statistics(pixels: Tensor, white: float) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, of pixels divided by `white`."""
    total = torch.zeros(pixels.shape[-1], dtype=torch.float64)
    squares = total.clone()
    for low in range(0, len(pixels), _RESIZE_AT_ONCE):
        flat = pixels[low : low + _RESIZE_AT_ONCE].reshape(-1, pixels.shape[-1]).double() / white
        total += flat.sum(0)
        squares += flat.square().sum(0)
    count = pixels.numel() // pixels.shape[-1]
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(0).sqrt()
    std = torch.where(std < 1e-6, torch.ones_like(std), std)  # a constant channel stays 0
    return mean.float(), std.float()
