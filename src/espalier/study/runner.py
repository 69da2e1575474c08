"""Evaluating the trials of a phase, each recorded as it ends."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from espalier.errors import StudyError
from espalier.problem import Problem, Reading
from espalier.study.book import Book
from espalier.study.executor import Job, Outcome, Pool
from espalier.study.trial import OnTrial, Trial

# So many trials that all failed are taken for a mistake in the user's code.
HOPELESS = 3


class Runner:
    """Evaluates what waits in a book. With a problem, it judges readings by it."""

    def __init__(
        self,
        book: Book,
        problem: Problem | None = None,
        deadline: float | None = None,
        on_trial: OnTrial | None = None,
    ) -> None:
        self.book, self.problem = book, problem
        self.deadline, self.on_trial = deadline, on_trial

    @property
    def late(self) -> bool:
        """Whether the deadline has passed."""
        return self.deadline is not None and time.time() >= self.deadline

    def run(self, pool: Pool) -> None:
        """Evaluates every trial that waits; at the deadline, only what has started is finished."""
        todo = {t.id: t for t in self.book.waiting}
        for outcome in pool.run(self._jobs(list(todo.values()))):
            self._record(todo[outcome.id], outcome)

    def _jobs(self, todo: list[Trial]) -> Iterator[Job]:
        for trial in todo:
            if self.late:
                return
            self.book.start(trial)
            yield Job(trial.id, trial.candidate)

    def _record(self, trial: Trial, outcome: Outcome) -> None:
        metrics = {**trial.metrics, **(outcome.readings or {})}
        error = outcome.error or ("" if outcome.readings is not None else "no result")
        error = error or self._unusable(metrics)
        violation = trial.violation if error else self._violation(metrics)
        ended = self.book.finish(outcome, metrics, violation, error)
        if self.on_trial is not None:
            self.on_trial(ended)

    def _unusable(self, metrics: dict[str, Reading]) -> str:
        """Why readings can't be told to a strategy; "" when they can."""
        for objective in self.problem.objectives if self.problem else ():
            if objective.name not in metrics:
                given = ", ".join(sorted(metrics)) or "nothing"
                return f"evaluate gave no {objective.name!r}, which is to be best; it gave {given}"
            if np.isnan(metrics[objective.name].value):
                return f"{objective.name} is NaN"
        return ""

    def _violation(self, metrics: dict[str, Reading]) -> float:
        limits = self.problem.limits if self.problem else ()
        return float(
            sum(x.violation([metrics[x.metric].value])[0] for x in limits if x.metric in metrics)
        )


def hopeless(book: Book, expected: int) -> bool:
    """Whether every one of the first trials failed: three, or all that are expected."""
    ended = book.ended
    enough = len(ended) >= min(HOPELESS, expected)
    return enough and all(t.state == "failed" for t in ended)


def check_hope(book: Book, expected: int) -> None:
    """Raises `StudyError` where every one of the first trials failed, so that a mistake in the
    user's code does not spend the budget."""
    if hopeless(book, expected):
        failed = list(book.ended)
        last = (failed[-1].error.strip().splitlines() or ["no reason given"])[-1]
        raise StudyError(
            f"all of the first {len(failed)} trials of {book.phase!r} failed, the last with: "
            f"{last}. Mend it and resume: they are run again"
        )
