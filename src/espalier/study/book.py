"""The trials of one phase in memory, in step with the ledger: nothing is read twice."""

from __future__ import annotations

import os
import socket
from collections.abc import Collection, Sequence
from dataclasses import replace

from espalier.problem import Reading
from espalier.space import Candidate
from espalier.study.executor import Outcome
from espalier.study.ledger import Ask, Ledger, NewTrial
from espalier.study.trial import Trial


class Book:
    """What one phase has so far. Every change is in the ledger before it is here.

    Opened by the driver; trials that were running belonged to a driver that is gone, and wait
    again.
    """

    def __init__(self, ledger: Ledger, phase: str) -> None:
        self.ledger, self.phase = ledger, phase
        self._lease = f"{os.getpid()}@{socket.gethostname()}"
        self._trials: dict[int, Trial] = {}
        self._ids: dict[Candidate, int] = {}
        # by state, so that no ask looks at all trials
        self._waiting: dict[int, Trial] = {}
        self._ended: dict[int, Trial] = {}
        ledger.release(phase)
        self._put(ledger.trials(phase))
        self.stopped = f"stop/{phase}" in ledger.meta()
        self.idle_asks = ledger.idle_asks(phase)

    def _put(self, trials: Sequence[Trial]) -> None:
        for trial in trials:
            self._ids[trial.candidate] = trial.id
            self._set(trial)

    def _set(self, trial: Trial) -> None:
        """A trial as it is now."""
        self._trials[trial.id] = trial
        self._waiting.pop(trial.id, None)
        self._ended.pop(trial.id, None)
        if trial.state == "waiting":
            self._waiting[trial.id] = trial
        elif trial.state in ("done", "failed"):
            self._ended[trial.id] = trial

    def __len__(self) -> int:
        return len(self._trials)

    def __contains__(self, candidate: Candidate) -> bool:
        return candidate in self._ids

    def __getitem__(self, candidate: Candidate) -> Trial:
        return self._trials[self._ids[candidate]]

    @property
    def waiting(self) -> list[Trial]:
        """Trials to evaluate, in the order asked."""
        return [self._waiting[key] for key in sorted(self._waiting)]

    @property
    def ended(self) -> Collection[Trial]:
        """Trials that are done or failed, in the order they ended."""
        return self._ended.values()

    def add_ask(self, strategy: str, ask: Ask, trials: Sequence[NewTrial]) -> None:
        """Records an ask and its trials."""
        self._put(self.ledger.add_ask(self.phase, strategy, ask, trials))
        self.idle_asks = 0 if trials else self.idle_asks + 1

    def add_trials(self, ask: int | None, trials: Sequence[NewTrial]) -> None:
        """Records trials of an ask made before, or of none."""
        self._put(self.ledger.add_trials(self.phase, ask, trials))

    def start(self, trial: Trial) -> None:
        """A trial is leased to a worker."""
        self.ledger.start(trial.id, self._lease)
        self._set(replace(trial, state="running", attempts=trial.attempts + 1))

    def finish(
        self, outcome: Outcome, metrics: dict[str, Reading], violation: float, error: str
    ) -> Trial:
        """A trial has ended."""
        trial = self.ledger.finish(outcome.id, metrics, violation, error, outcome)
        self._set(trial)
        return trial

    def release(self) -> None:
        """Trials that run wait again: the driver is ending."""
        self.ledger.release(self.phase)

    def again(self, ask: int | None) -> None:
        """Failed trials of an ask, or of none, wait again."""
        self.ledger.again(self.phase, ask)
        self._put(self.ledger.trials(self.phase))

    def stop(self, reason: str) -> None:
        """The phase ends here; trials that did not start are withdrawn."""
        self.ledger.stop(self.phase, reason)
        self.stopped = True
        for trial in self.waiting:
            del self._trials[trial.id], self._ids[trial.candidate], self._waiting[trial.id]
