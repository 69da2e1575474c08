"""Candidates scored with the shared weights of a trained supernet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from espalier import train
from espalier.estimators.estimator import Estimator
from espalier.estimators.rows import columns, estimated, threads
from espalier.problem import Metrics
from espalier.space import Candidate
from espalier.tasks import Split, Task
from espalier.train.evaluate import calibration
from espalier.train.precision import autocast, resolve
from espalier.train.recipe import Precision
from espalier.train.running import device_of, evaluating, laid_out
from espalier.train.seeds import generator

_BATCH = 512


class OneShot(Estimator):
    """Activates each candidate, sets its batch-norm statistics, evaluates it on `split`.

    The statistics come from `calibration_images` of train, the score from up to `images` of
    `split`; both are chosen once by `seed`, the same for all candidates. The supernet is left as
    it was. Computes on the device that the supernet is on, with `threads` threads, one by default:
    processes go beside each other.
    One-shot evaluation: Bender et al., 2018; statistics per candidate: Yu & Huang, 2019.
    """

    def __init__(
        self,
        supernet: Any,
        task: Task,
        seed: int = 0,
        split: Split = "validation",
        images: int = 2000,
        calibration_images: int = 512,
        precision: Precision = "auto",
        threads: int = 1,
    ) -> None:
        self.supernet, self.task, self.seed, self.split = supernet, task, seed, split
        self.images, self.calibration_images = images, calibration_images
        self.precision, self.threads = precision, threads
        self.metrics = estimated(task, split)
        self._data: tuple[list[Tensor], list[Tensor], Tensor] | None = None

    def estimate(self, candidates: Sequence[Candidate]) -> Metrics:
        """The task's metrics on `split`, a row a candidate, in the order given."""
        with threads(self.threads), _untouched(self.supernet):
            return columns(self.metrics, [self._score(c) for c in candidates])

    def _score(self, candidate: Candidate) -> dict[str, float]:
        calibrating, inputs, targets = self._loaded()
        self.supernet.activate(candidate)
        device = device_of(self.supernet)
        with autocast(resolve(self.precision, device.type), device.type):
            train.set_statistics(self.supernet, calibrating)
            with evaluating(self.supernet), torch.inference_mode():
                outputs = [self.supernet(x).float().cpu() for x in inputs]
        return self.task.measure(torch.cat(outputs), targets)

    def _loaded(self) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Batches to calibrate on, inputs and targets to score on; read once a process."""
        if self._data is None:
            batches = max(1, round(self.calibration_images / _BATCH))
            size = min(_BATCH, self.calibration_images)
            inputs, targets, device = [], [], device_of(self.supernet)
            for x, y in self._scored():
                inputs.append(laid_out(self.supernet, x.to(device)))
                targets.append(y)
            found = calibration(self.task, batches, size, self.seed)
            calibrating = [laid_out(self.supernet, x.to(device)) for x in found]
            self._data = calibrating, inputs, torch.cat(targets)
        return self._data

    def _scored(self) -> Iterator[tuple[Tensor, Tensor]]:
        some = self.task.size(self.split) > self.images
        order = generator(self.seed) if some else None
        left = self.images
        for x, y in self.task.batches(self.split, min(_BATCH, self.images), order):
            yield x[:left], y[:left]
            left -= len(y)
            if left <= 0:
                return

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_data": None}  # each process reads its own


@contextmanager
def _untouched(supernet: nn.Module) -> Iterator[None]:
    """Puts the batch-norm statistics and the active candidate of a supernet back afterwards."""
    norms = [m for m in supernet.modules() if isinstance(m, _BatchNorm)]
    buffers = [(b, b.clone()) for norm in norms for b in norm.buffers()]
    active = getattr(supernet, "active", None)
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        if active is not None:
            supernet.activate(active)  # type: ignore[operator]
