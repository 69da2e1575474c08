"""Windows of the standard library's source, which module each is from, and tasks on them."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from espalier.compress.repair.distil import distance
from espalier.problem import Metric
from espalier.tasks.task import Split
from espalier.tasks.tensors import SPLITS, TensorTask

_TEMPERATURE = 2.0
_BLOCK = 3840  # bytes dealt to a split together
_SHARES: dict[Split, float] = {"train": 0.7, "validation": 0.15, "test": 0.15}


class Windows(TensorTask):
    """Tokens `(b, tokens)`; targets are the teacher's logits and, last, the label, which is only
    measured with. The loss is the distance to the teacher."""

    metrics: tuple[Metric, ...] = (
        Metric("distance", "nats", "min", "measured"),
        Metric("accuracy", goal="max", how="measured"),
    )

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Softened divergence from the teacher's logits."""
        return distance(outputs, targets[:, :-1], targets[:, -1].long(), _TEMPERATURE)

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Distance to the teacher and accuracy by the labels."""
        right = (outputs.argmax(1) == targets[:, -1].long()).float().mean()
        return {"distance": float(self.loss(outputs, targets)), "accuracy": float(right)}


class Labelled(Windows):
    """The same windows with labels to learn from: the teacher's task."""

    metrics = (Metric("accuracy", goal="max", how="measured"),)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy of the labels."""
        return cross_entropy(outputs, targets[:, -1].long())


@dataclass(frozen=True)
class Text:
    """Windows of bytes of the standard library's largest modules, and which module each is from."""

    windows: dict[Split, NDArray[np.uint8]]
    labels: dict[Split, Tensor]
    names: tuple[str, ...]


def read(classes: int, size: int, count: int, seed: int) -> Text:
    """About `count` windows of `size` bytes, as many of each module; `seed` deals blocks to splits."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"), key=lambda f: (-f.stat().st_size, f.name))  # fmt: skip
    chosen = files[:classes]
    each = count // classes
    rng = np.random.default_rng([seed, 0xC3])
    windows: dict[Split, list[NDArray[np.uint8]]] = {split: [] for split in SPLITS}
    labels: dict[Split, list[int]] = {split: [] for split in SPLITS}
    for label, file in enumerate(chosen):
        data = np.frombuffer(file.read_bytes(), np.uint8)
        block = _BLOCK // size * size
        blocks = data[: len(data) // block * block].reshape(-1, block)
        blocks = blocks[rng.permutation(len(blocks))]
        start = 0
        for split, share in _SHARES.items():
            end = start + max(1, round(share * len(blocks)))
            rows = blocks[start:end].reshape(-1, size)
            rows = rows[rng.permutation(len(rows))[: max(1, round(share * each))]]
            windows[split].append(rows)
            labels[split] += [label] * len(rows)
            start = end
    return Text(
        {split: np.concatenate(rows) for split, rows in windows.items()},
        {split: torch.tensor(y) for split, y in labels.items()},
        tuple(file.stem for file in chosen),
    )
