"""Tasks whose data are tensors in memory: own tasks need only add a loss and metrics."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from espalier.errors import DataError
from espalier.tasks.task import Split, Task

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
_CHUNK = 2048  # examples prepared at a time: one call for many batches, bounded memory


class TensorTask(Task):
    """A task over three pairs of tensors, inputs and targets, one row an example.

    Subclasses give `metrics` and write `loss` and `measure`; `prepare` may turn stored inputs
    into what the network reads. `outputs` is the width of the network's output.
    Errors: `DataError` for a missing or empty split, rows that don't match, or NaN (which item).
    """

    def __init__(
        self, splits: Mapping[Split, tuple[Tensor, Tensor]], outputs: int, name: str = "own task"
    ) -> None:
        self.name, self.classes = name, outputs
        self._splits = {split: _checked(split, splits) for split in SPLITS}
        self.shape = tuple(self._splits["train"][0].shape[1:])
        for split in SPLITS:
            if tuple(self._splits[split][0].shape[1:]) != self.shape:
                got = tuple(self._splits[split][0].shape[1:])
                raise DataError(f"{split} inputs must have shape {self.shape} as train, got {got}")
        self._fingerprint = ""

    def size(self, split: Split) -> int:
        """Number of examples in a split."""
        return len(self._splits[split][1])

    def prepare(self, inputs: Tensor, generator: torch.Generator | None, augment: bool) -> Tensor:
        """Stored inputs `(b, ...)` as the network reads them, float32 `(b, *shape)`."""
        return inputs.float()

    def batches(
        self,
        split: Split,
        batch: int,
        generator: torch.Generator | None = None,
        augment: bool = False,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over a split; random order with a generator, the data's order without."""
        inputs, targets = self._splits[split]
        total = len(targets)
        order = None if generator is None else torch.randperm(total, generator=generator)
        chunk = batch * max(1, _CHUNK // batch)
        for start in range(0, total, chunk):
            rows = slice(start, start + chunk) if order is None else order[start : start + chunk]
            x, y = self.prepare(inputs[rows], generator, augment), targets[rows]
            for low in range(0, len(y), batch):
                part = slice(low, low + batch)
                if generator is not None and len(y[part]) == 1 and total > 1:
                    continue  # batch normalisation can't learn from one example
                yield x[part], y[part]

    @property
    def fingerprint(self) -> str:
        """16 hex digits of the data, in the order of the splits."""
        if not self._fingerprint:
            digest = hashlib.sha256(self._settings().encode())
            for split in SPLITS:
                for tensor in self._splits[split]:
                    digest.update(f"{split} {tuple(tensor.shape)} {tensor.dtype}".encode())
                    digest.update(tensor.contiguous().numpy().tobytes())
            self._fingerprint = digest.hexdigest()[:16]
        return self._fingerprint

    def _settings(self) -> str:
        """What else the numbers depend on."""
        return f"{self.classes}"


def _checked(split: Split, splits: Mapping[Split, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if split not in splits:
        raise DataError(f"a task needs the splits {', '.join(SPLITS)}; {split!r} is missing")
    inputs, targets = splits[split]
    if len(inputs) != len(targets) or len(targets) == 0:
        raise DataError(
            f"{split} needs as many targets as inputs and at least one, "
            f"got {len(inputs)} inputs and {len(targets)} targets"
        )
    for what, tensor in (("input", inputs), ("target", targets)):
        bad = first_not_finite(tensor)
        if bad is not None:
            raise DataError(f"{split} {what} {bad} holds NaN or infinity: remove or mend that item")
    return inputs, targets


def first_not_finite(tensor: Tensor) -> int | None:
    """Index of the first row that holds NaN or infinity; None where all are finite."""
    if not tensor.is_floating_point():
        return None
    broken = ~torch.isfinite(tensor.reshape(len(tensor), -1)).all(dim=1)
    return int(broken.nonzero()[0]) if bool(broken.any()) else None
