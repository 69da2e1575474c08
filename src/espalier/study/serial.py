"""Trials one after the other, in this process."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from espalier.study.executor import Executor, Job, Outcome, Pool, call
from espalier.study.threads import limit_torch, one_thread
from espalier.study.trial import Evaluate


@dataclass(frozen=True)
class Serial(Executor):
    """Evaluates in this process, on one thread. A trial that raises is tried `retries` times more.

    It can't end a trial that hangs; `Processes(1, trial_seconds=...)` can.
    """

    retries: int = 1

    @contextmanager
    def open(self, evaluate: Evaluate) -> Iterator[Pool]:
        """A pool of one."""
        with one_thread():
            yield _SerialPool(evaluate, self.retries)


class _SerialPool(Pool):
    def __init__(self, evaluate: Evaluate, retries: int) -> None:
        self._evaluate, self._retries = evaluate, retries

    def run(self, jobs: Iterable[Job]) -> Iterator[Outcome]:
        """Each job in turn."""
        for job in jobs:
            yield self._one(job)

    def _one(self, job: Job) -> Outcome:
        error, attempt, started = "", 0, time.perf_counter()
        while attempt <= self._retries:
            attempt += 1
            limit_torch()  # evaluate may have imported it, or changed the number
            started = time.perf_counter()
            try:
                readings = call(self._evaluate, job.candidate)
            except Exception:
                error = traceback.format_exc()
                continue
            seconds = time.perf_counter() - started
            return Outcome(job.id, readings, "", seconds, attempt, "serial")
        return Outcome(job.id, None, error, time.perf_counter() - started, attempt, "serial")
