"""Where trials are evaluated. An executor opens a pool; a pool evaluates jobs as they come."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from espalier.problem import Reading
from espalier.space import Candidate
from espalier.study.trial import Evaluate


@dataclass(frozen=True)
class Job:
    """A candidate to evaluate, under the id of its trial."""

    id: int
    candidate: Candidate


@dataclass(frozen=True)
class Outcome:
    """What came of a job: readings, or the traceback of the last attempt in `error`."""

    id: int
    readings: dict[str, Reading] | None
    error: str
    seconds: float
    attempts: int
    worker: str


class Pool(ABC):
    """An open executor."""

    @abstractmethod
    def run(self, jobs: Iterable[Job]) -> Iterator[Outcome]:
        """Evaluates every job and gives outcomes as they finish, in any order.

        A job is taken from `jobs` only when it can start at once: the caller may end the iterable
        at any time, and what was taken is finished.
        """


class Executor(ABC):
    """Opens pools. Whatever it is, the readings are the same: each trial computes on one thread."""

    @abstractmethod
    def open(self, evaluate: Evaluate) -> AbstractContextManager[Pool]:
        """A pool for one function; leaving the context ends everything it started."""


def call(evaluate: Evaluate, candidate: Candidate) -> dict[str, Reading]:
    """Evaluates and checks that the answer is a mapping of names to `Reading`s.

    Values become plain floats, so that they can be sent and stored. Raises `TypeError`.
    """
    readings = evaluate(candidate)
    if not isinstance(readings, dict) or not all(
        isinstance(k, str) and isinstance(r, Reading) for k, r in readings.items()
    ):
        raise TypeError(
            f"evaluate must give a dict of metric name to Reading, got {str(readings)[:80]!r}"
        )
    return {
        k: replace(r, value=float(r.value), spread=None if r.spread is None else float(r.spread))
        for k, r in readings.items()
    }
