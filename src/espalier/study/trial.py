"""A trial: one candidate that was, is or will be evaluated, and everything known about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from numpy.typing import NDArray

from espalier.problem import Metrics, Reading
from espalier.space import Candidate

State = Literal["done", "failed", "running", "waiting"]
Evaluate = Callable[[Candidate], dict[str, Reading]]
Price = Callable[[NDArray[Any]], Metrics]
OnTrial = Callable[["Trial"], None]


@dataclass(frozen=True)
class Trial:
    """One row of the ledger.

    `position` counts within the phase from 0; `violation` is the sum of relative violations of the
    limits (0: all kept); `seconds` is the time of the last attempt; `error` is the traceback of a
    failed one; `started` and `finished` are seconds since the epoch.
    """

    id: int
    phase: str
    position: int
    candidate: Candidate
    state: State
    metrics: dict[str, Reading]
    violation: float
    seconds: float | None
    attempts: int
    error: str
    worker: str
    started: float | None = None
    finished: float | None = None
