"""How fast this machine trains: a few steps, timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from espalier.tasks import Split, Task


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch on `count` threads, and on what it had afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def timed_second(work: Callable[[], object], count: int) -> float:
    """Seconds of the second run of `work` on `count` threads; the first one warms up."""
    with threads(count):
        work()
        started = time.perf_counter()
        work()
        return time.perf_counter() - started


class FewBatches(Task):
    """A task that ends each pass after a few batches: for timing a step, never for results."""

    def __init__(self, task: Task, count: int) -> None:
        self._task, self._count = task, count
        self.name, self.shape, self.classes = task.name, task.shape, task.classes
        self.metrics = task.metrics

    def size(self, split: Split) -> int:
        """The size of the whole split."""
        return self._task.size(split)

    def batches(
        self,
        split: Split,
        batch: int,
        generator: torch.Generator | None = None,
        augment: bool = False,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The first few batches."""
        for i, pair in enumerate(self._task.batches(split, batch, generator, augment)):
            if i >= self._count:
                return
            yield pair

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The task's loss."""
        return self._task.loss(outputs, targets)

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """The task's metrics."""
        return self._task.measure(outputs, targets)

    @property
    def fingerprint(self) -> str:
        """The task's fingerprint."""
        return self._task.fingerprint

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._task, name)
