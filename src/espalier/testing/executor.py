"""Checks that any executor must pass: `check_executor(Processes(2))`."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator

from espalier.problem import Reading
from espalier.space import Candidate
from espalier.study.executor import Executor, Job, Outcome


def compute(candidate: Candidate) -> dict[str, Reading]:
    """A number of the candidate, the threads of its process; raises for `x` below 0."""
    x = float(candidate["x"])
    if x < 0:
        raise ArithmeticError(f"x is {x:g}, below 0")
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch is not None else 1
    return {"y": Reading(math.sin(x) * x), "threads": Reading(float(threads))}


def nonsense(candidate: Candidate) -> dict[str, Reading]:
    """Not what an evaluate function gives."""
    return 3.0  # type: ignore[return-value]


def check_executor(executor: Executor) -> None:
    """Raises `AssertionError` with the rule broken."""
    _check_outcomes(executor)
    _check_failures(executor)
    _check_lazy(executor)


def _jobs(*numbers: int) -> list[Job]:
    return [Job(100 + i, Candidate({"x": n})) for i, n in enumerate(numbers)]


def _by_id(outcomes: Iterator[Outcome]) -> dict[int, Outcome]:
    listed = list(outcomes)
    found = {o.id: o for o in listed}
    assert len(found) == len(listed), "a job gives one outcome"
    return found


def _check_outcomes(executor: Executor) -> None:
    """Every job gives the number that a plain call gives; a pool runs several times."""
    with executor.open(compute) as pool:
        assert list(pool.run([])) == [], "no jobs give no outcomes"
        for numbers in ((1, 2, 3, 4, 5), (6,)):
            found = _by_id(pool.run(_jobs(*numbers)))
            for job in _jobs(*numbers):
                outcome = found[job.id]
                assert outcome.readings is not None, outcome.error
                assert outcome.readings["y"] == compute(job.candidate)["y"], "numbers must be equal"
                assert outcome.readings["threads"].value == 1, "a trial has one thread"
                assert (outcome.error, outcome.attempts) == ("", 1)
                assert outcome.seconds >= 0
                assert outcome.worker, "an outcome says who computed it"


def _check_failures(executor: Executor) -> None:
    """A trial that raises is tried again, then failed with its traceback; the others go on."""
    with executor.open(compute) as pool:
        found = _by_id(pool.run(_jobs(1, -2, 3)))
    bad = found[101]
    assert bad.readings is None, "a trial that raises has no readings"
    assert "ArithmeticError: x is -2, below 0" in bad.error, bad.error
    assert "Traceback" in bad.error, "the traceback is kept"
    assert bad.attempts == getattr(executor, "retries", 1) + 1, "it is tried again"
    assert all(found[i].readings for i in (100, 102)), "other trials are not touched"
    with executor.open(nonsense) as pool:
        outcome = next(iter(pool.run(_jobs(1))))
    assert "evaluate must give a dict" in outcome.error, outcome.error


def _check_lazy(executor: Executor) -> None:
    """A job is taken when it can start, not before; what was taken is finished."""
    taken: list[int] = []

    def source() -> Iterator[Job]:
        for job in _jobs(*range(40)):
            taken.append(job.id)
            yield job

    with executor.open(compute) as pool:
        run = pool.run(source())
        next(run)
        assert len(taken) <= 2 * (os.cpu_count() or 1) + 8, f"{len(taken)} jobs taken at once"
        rest = len(list(run))
    assert rest + 1 == len(taken) == 40, "every job is run"
