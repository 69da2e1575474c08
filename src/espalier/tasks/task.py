"""What every task is: data in three disjoint splits, a loss, and metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from espalier.problem import Metric

Split = Literal["train", "validation", "test"]


class Task(ABC):
    """What a network must do. Own tasks subclass it; see the how-to "own task".

    A search uses train and validation only; test is read once, for the report.
    `metrics[0]` is what a search is judged by.
    """

    name: str = "task"
    text: str = ""  # the line that names it with all its options, where it was made from one
    shape: tuple[int, ...]  # one input, without the batch dimension
    classes: int  # width of the network's output
    metrics: tuple[Metric, ...]

    @abstractmethod
    def size(self, split: Split) -> int:
        """Number of examples in a split."""

    @abstractmethod
    def batches(
        self,
        split: Split,
        batch: int,
        generator: torch.Generator | None = None,
        augment: bool = False,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over a split: inputs `(b, *shape)` float32, ready for a network, and targets.

        With a generator the order (and augmentation) is random and decided by it alone; without,
        the order is that of the data. Training passes drop a last batch of one example.
        """

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """A scalar to be minimised."""

    @abstractmethod
    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """The metrics over a whole split: all outputs and all targets, stacked."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A stable hash of the data and of how it is split; resuming with another is refused."""
