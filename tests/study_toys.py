"""Toy spaces, prices and evaluate functions for the tests of studies; importable by workers."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.problem import Limit, Metric, Metrics, Problem, Reading, front
from espalier.solvers.strategies import Strategy, make
from espalier.space import Candidate, Space, integer
from espalier.study import Executor, Processes, Serial, Study, Trial

SPACE = Space([integer(name, 0, 9) for name in "abcd"])
PROBLEM = Problem((Metric("error"), Metric("cost")), (Limit("cost", 16.0),))
IDENTITY = {"task": "toy", "space": SPACE.fingerprint, "limits": ["cost <= 16"]}


def price(codes: NDArray[Any]) -> Metrics:
    """The sum of the decisions."""
    return Metrics({"cost": codes.sum(1).astype(float)}, [Metric("cost", "u")])


def error_of(candidate: Candidate) -> float:
    """How far the decisions are from 6, a little uneven so that no two candidates are equal."""
    values = [int(candidate[name]) for name in "abcd"]
    jitter = int(hashlib.sha256(candidate.text.encode()).hexdigest()[:8], 16) / 2**32
    return float(sum((v - 6) ** 2 for v in values)) + jitter


def evaluate(candidate: Candidate) -> dict[str, Reading]:
    """The error, at once."""
    return {"error": Reading(error_of(candidate), how="estimated", split="validation")}


@dataclass(frozen=True)
class Logged:
    """Evaluates in about `rounds` / 100 ms of fixed work; each call leaves a line in a file."""

    log: Path
    rounds: int = 500

    def __call__(self, candidate: Candidate) -> dict[str, Reading]:
        """The error; the line is on disk before it is given."""
        salt = candidate.text.encode()
        digest = hashlib.pbkdf2_hmac("sha256", b"work", salt, self.rounds * 10)
        with open(self.log, "a") as file:
            file.write(f"{candidate.id} {os.getpid()}\n")
            file.flush()
            os.fsync(file.fileno())
        work = int.from_bytes(digest[:4], "big") / 2**32
        return {"error": Reading(error_of(candidate)), "work": Reading(work)}


@dataclass(frozen=True)
class Trouble:
    """Does `what` to its worker for candidates whose `a` is `at`; the first time, or always."""

    folder: Path
    what: str
    at: int = 3
    always: bool = False

    def __call__(self, candidate: Candidate) -> dict[str, Reading]:
        """The error, unless there is trouble."""
        mark = self.folder / candidate.id
        if candidate["a"] == self.at and (self.always or not mark.exists()):
            mark.touch()
            _ACTS[self.what]()
        return evaluate(candidate)


def _recurse() -> None:
    raise RecursionError("too deep\nin two lines")


_ACTS: dict[str, Callable[[], Any]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "abort": os.abort,
    "exit": lambda: os._exit(7),
    "quit": lambda: sys.exit(7),
    "hang": lambda: time.sleep(600),
    "raise": _recurse,
}


def broken(candidate: Candidate) -> dict[str, Reading]:
    """A mistake in the user's code."""
    raise ValueError("the user's mistake")


def candidates(n: int, seed: int = 0) -> list[Candidate]:
    """n different candidates; `a` counts up."""
    codes = SPACE.sample(n, np.random.default_rng(seed))
    codes[:, 0] = np.arange(n) % 10
    codes[:, 1] = np.arange(n) // 10
    return SPACE.decode(codes)


def executor(workers: int) -> Executor:
    """0: serial."""
    return Processes(workers) if workers else Serial()


def search(
    study: Study,
    evaluate: Any = evaluate,
    strategy: str | Strategy = "nsga2",
    trials: int = 40,
    batch: int = 8,
    workers: int = 0,
    problem: Problem = PROBLEM,
    **options: Any,
) -> list[Trial]:
    """The search that the tests repeat."""
    made = make(strategy, SPACE, 3) if isinstance(strategy, str) else strategy
    options = {"executor": executor(workers), "price": price, **options}
    return study.search("search", problem, made, evaluate, trials=trials, batch=batch, **options)


def result(trials: list[Trial]) -> list[Any]:
    """Everything that must not depend on workers or interruptions."""
    return [
        [t.position, t.candidate.to_json(), t.state, t.violation]
        + [[name, r.to_json()] for name, r in sorted(t.metrics.items())]
        for t in trials
    ]


def front_of(trials: list[Trial]) -> list[str]:
    """The candidates on the front."""
    done = [t for t in trials if t.state == "done"]
    values = np.array([[t.metrics[o.name].value for o in PROBLEM.objectives] for t in done])
    return [done[i].candidate.text for i in front(values)]
