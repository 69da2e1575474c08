"""A study: one durable run in one folder. Made, resumed, or opened to be read."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from espalier.errors import StudyError
from espalier.problem import Problem
from espalier.solvers.strategies.strategy import Strategy
from espalier.space import Candidate
from espalier.study import worker
from espalier.study.book import Book
from espalier.study.executor import Executor
from espalier.study.identity import differences, summary, versions
from espalier.study.ledger import Ledger, NewTrial
from espalier.study.processes import GUARD
from espalier.study.runner import Runner, hopeless
from espalier.study.schema import NAME, inspect
from espalier.study.search import Search
from espalier.study.trial import Evaluate, OnTrial, Price, Trial


class Study:
    """One durable run: what it is about, its trials, and what was computed once.

    Make one with `Study.create`, `Study.resume` or `Study.open`; close it, or use it as a context.
    What a study gives depends on its seed and identity only: not on the number of workers, nor on
    how often it was killed. `notes` are lines a person should read, such as a changed version.
    """

    def __init__(self, folder: Path, ledger: Ledger, lock: FileLock | None) -> None:
        self.folder = folder
        self.notes: list[str] = []
        self._ledger = ledger
        self._lock = lock

    # --- opening and closing -------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        folder: str | Path,
        identity: Mapping[str, Any],
        settings: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> Study:
        """A new study in a folder that has none.

        `identity` (JSON) must be the same when it is resumed; `settings` may change. Raises
        `StudyError` where the folder has a study or can't be written; nothing is overwritten.
        """
        folder, lock = _locked(Path(folder), make=True)
        path = folder / NAME
        try:
            if path.exists():
                inspect(path)
                raise StudyError(
                    f"{folder} holds a study already: resume it, or choose another folder"
                )
            meta = {
                "identity": dict(identity),
                "settings": dict(settings or {}),
                "seed": seed,
                "versions": versions(),
                "created": time.time(),
            }
            study = cls(folder, Ledger.create(path, meta), lock)
            study._drive()
        except BaseException:
            lock.release()
            raise
        return study

    @classmethod
    def resume(cls, folder: str | Path, identity: Mapping[str, Any]) -> Study:
        """Goes on with a study. Raises `StudyError`, with the difference, for another identity.

        Other versions of packages are recorded as an event and said in `notes`.
        """
        folder = Path(folder)
        inspect(folder / NAME)
        folder, lock = _locked(folder, make=False)
        try:
            newer = _compared(folder, json.loads(json.dumps(dict(identity))))
            study = cls(folder, Ledger.open(folder / NAME), lock)
        except BaseException:
            lock.release()
            raise
        try:
            study._note_versions(newer)
            study.event("resumed", pid=os.getpid())
            study._drive()
        except BaseException:
            study.close()
            raise
        return study

    @classmethod
    def open(cls, folder: str | Path) -> Study:
        """A study to be read, also while it runs. Changes nothing."""
        folder = Path(folder)
        return cls(folder, Ledger.open(folder / NAME, writable=False), None)

    def _note_versions(self, changed: list[str]) -> None:
        if changed:
            self.notes.append(
                f"resumed with other versions: {summary(changed)}; later numbers may differ a little"
            )
            self.event("versions", changed=changed)
            self._ledger.set_meta("versions", versions())

    def _drive(self) -> None:
        """Records who drives, for the message that a second driver gets."""
        driver = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
        self._ledger.set_meta("driver", driver)

    def close(self) -> None:
        """Closes the ledger and lets others drive."""
        self._ledger.close()
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, KeyboardInterrupt) and not error.args:
            error.args = (str(self.folder),)  # for whoever tells how to go on
        self.close()

    # --- what is recorded ----------------------------------------------------------------------

    @property
    def meta(self) -> dict[str, Any]:
        """identity, settings, seed, versions, created, driver; `phase/...` and `stop/...`."""
        return self._ledger.meta()

    @property
    def seed(self) -> int:
        """The seed that everything is derived from."""
        return int(self._ledger.meta()["seed"])

    def once(self, key: str, compute: Callable[[], Any]) -> Any:
        """What `compute` gave when it was first called under this key, as JSON; computed once.

        What is measured goes through here, so that a resumed study does not measure it again.
        """
        found = self._ledger.recorded(key)
        return found[0] if found is not None else self._ledger.record(key, compute())

    def recorded(self) -> dict[str, Any]:
        """Everything that was computed once, by its key."""
        return self._ledger.recorded_all()

    def event(self, kind: str, /, **data: Any) -> None:
        """Records that something happened now."""
        self._ledger.event(kind, data)

    def events(self) -> list[dict[str, Any]]:
        """Everything that happened, oldest first: `time`, `kind` and what was recorded with it."""
        return self._ledger.events()

    def phase_seconds(self) -> dict[str, float]:
        """Seconds of each phase over all runs, from events of kind "phase" (`name`, `seconds`)."""
        out: dict[str, float] = {}
        for event in self.events():
            if event["kind"] == "phase":
                out[event["name"]] = out.get(event["name"], 0.0) + event["seconds"]
        return out

    def trials(self, phase: str | None = None) -> list[Trial]:
        """The trials of one phase, or of all, in the order they were made."""
        return self._ledger.trials(phase)

    def refused(self, phase: str) -> dict[str, Any]:
        """How many candidates were asked and refused by price, and how many broke each limit."""
        out: dict[str, Any] = {"asked": 0, "refused": 0, "by": {}}
        for ask in self._ledger.refused(phase):
            out["asked"] += ask["asked"]
            out["refused"] += ask["refused"]
            for limit, count in ask["by"].items():
                out["by"][limit] = out["by"].get(limit, 0) + count
        return out

    # --- work ----------------------------------------------------------------------------------

    def search(
        self,
        phase: str,
        problem: Problem,
        strategy: Strategy,
        evaluate: Evaluate,
        *,
        trials: int,
        batch: int,
        executor: Executor,
        price: Price | None = None,
        deadline: float | None = None,
        on_trial: OnTrial | None = None,
    ) -> list[Trial]:
        """Asks `strategy` for `batch` candidates at a time until `trials` were evaluated.

        Candidates whose price breaks a limit are refused before anything is paid for them. Ends
        earlier at `deadline` (seconds since the epoch; trials that run are finished, and the
        decision is recorded), when the space is exhausted, or when 100 asks in a row made no
        trial: what there is, is returned. `evaluate` may be called again for a trial that was
        interrupted, never for a finished one.

        Raises `StudyError` when every one of the first trials failed: it holds the last line of
        the traceback, and resuming runs them again.
        """
        if trials < 1 or batch < 1:
            raise StudyError(f"trials and batch must be at least 1, got {trials} and {batch}")
        self._describe(phase, problem, strategy)
        book = Book(self._ledger, phase)
        runner = Runner(book, problem, deadline, on_trial)
        with _released(book):
            Search(book, problem, strategy, evaluate, trials, batch, executor, price, runner).run()
        return self.trials(phase)

    def _describe(self, phase: str, problem: Problem, strategy: Strategy) -> None:
        """Records what a phase searches, for readers; refuses another space or strategy."""
        now: dict[str, Any] = {
            "strategy": strategy.name,
            "space": strategy.space.to_json(),
            "objectives": [{"name": o.name, "goal": o.goal} for o in problem.objectives],
            "limits": [str(x) for x in problem.limits],
        }
        now = json.loads(json.dumps(now))
        before = self._ledger.meta().get(f"phase/{phase}")
        if before is None:
            self._ledger.set_meta(f"phase/{phase}", now)
        elif changed := differences(before, now):
            raise StudyError(
                f"phase {phase!r} of {self.folder} searched something else: {summary(changed)} "
                "(recorded -> given). Use another phase or folder"
            )

    def map(
        self,
        phase: str,
        candidates: Iterable[Candidate],
        evaluate: Evaluate,
        *,
        executor: Executor,
        on_trial: OnTrial | None = None,
    ) -> list[Trial]:
        """Evaluates given candidates, each once; gives their trials in the order given.

        A trial that failed stays failed, except where all of them did: those run again when the
        same phase is mapped again, because the code may have been mended.
        """
        wanted = list(candidates)
        book = Book(self._ledger, phase)
        if wanted and hopeless(book, len(wanted)):
            book.again(None)  # the user's code may have been mended
        book.add_trials(None, [NewTrial(c, {}) for c in dict.fromkeys(wanted) if c not in book])
        with _released(book), executor.open(evaluate) as pool:
            Runner(book, on_trial=on_trial).run(pool)
        return [book[c] for c in wanted]


@contextmanager
def _released(book: Book) -> Iterator[None]:
    """What was running is recorded as waiting when the driver ends early."""
    try:
        yield
    except BaseException:
        # where the disk is full this fails too, and the next resume releases them
        with suppress(StudyError):
            book.release()
        raise


def _compared(folder: Path, identity: dict[str, Any]) -> list[str]:
    """Refuses another identity, before anything is written; gives the versions that differ."""
    ledger = Ledger.open(folder / NAME, writable=False)
    meta = ledger.meta()
    ledger.close()
    changed = differences(meta["identity"], identity)
    if changed:
        raise StudyError(
            f"{folder} is a study of something else: {summary(changed)} (recorded -> given). "
            "Resume with what is recorded, or choose another folder"
        )
    return differences(meta["versions"], versions())


def _locked(folder: Path, make: bool) -> tuple[Path, FileLock]:
    """The folder and its lock, held: one process drives a study."""
    if worker.loading_main:
        raise StudyError(GUARD)
    lock = FileLock(folder / "ledger.lock")
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise StudyError(_who_drives(folder)) from None
    except OSError as error:
        raise StudyError(
            f"the study folder {folder} can't be written: {error.strerror or error}; "
            "check its permissions and free space, or choose another folder"
        ) from error
    return folder, lock


def _who_drives(folder: Path) -> str:
    """Which process holds the lock, read from the ledger."""
    who = "another process"
    try:
        ledger = Ledger.open(folder / NAME, writable=False)
        driver = ledger.meta().get("driver")
        ledger.close()
        if driver:
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(driver["since"]))
            who = f"process {driver['pid']} on {driver['host']} since {since}"
    except (StudyError, KeyError):
        pass  # it is being created
    return f"the study in {folder} is run by {who}: wait for it or end it, then resume"
