"""From the task's metrics of each candidate to columns, said to be estimated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from espalier.problem import Metric, Metrics
from espalier.tasks import Split, Task


def estimated(task: Task, split: Split) -> tuple[Metric, ...]:
    """The task's metrics as an estimator gives them: how "estimated", on `split`."""
    return tuple(replace(m, how="estimated", split=split) for m in task.metrics)


def columns(about: Sequence[Metric], rows: Sequence[dict[str, float]]) -> Metrics:
    """A row a candidate, a column a metric."""
    return Metrics({m.name: [row[m.name] for row in rows] for m in about}, about)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Runs torch on `count` threads: sums, and so results, depend on their number."""
    before = torch.get_num_threads()
    if before != count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if before != count:
            torch.set_num_threads(before)
