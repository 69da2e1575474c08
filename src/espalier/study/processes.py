"""Trials on worker processes of this machine: a dead or hanging worker costs a retry."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe, spawn
from multiprocessing.connection import Connection, wait
from typing import Any

from espalier.errors import StudyError
from espalier.study import worker as worker_module
from espalier.study.executor import Executor, Job, Outcome, Pool
from espalier.study.threads import ONE_THREAD
from espalier.study.trial import Evaluate

_POLL_SECONDS = 0.2
_START_SECONDS = 600.0  # importing torch and unpickling a data set may be slow, but not this slow
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from espalier.study.worker import serve; serve(int(sys.argv[2]), int(sys.argv[3]))"
)
GUARD = (
    "the script starts worker processes while it is imported by one: put its calls under "
    "`if __name__ == '__main__':`, define what workers need in a module, or use workers=0"
)


@dataclass(frozen=True)
class Processes(Executor):
    """`workers` fresh interpreters, each with one thread for every library.

    A trial that raises, whose worker dies, or that takes longer than `trial_seconds` is tried
    `retries` times more, then failed with the reason kept. `evaluate` is pickled to each worker.
    """

    workers: int
    trial_seconds: float | None = None
    retries: int = 1

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise StudyError(f"Processes needs at least 1 worker, got {self.workers}")
        if self.trial_seconds is not None and self.trial_seconds <= 0:
            raise StudyError(f"trial_seconds must be above 0, got {self.trial_seconds}")

    @contextmanager
    def open(self, evaluate: Evaluate) -> Iterator[Pool]:
        """A pool whose workers start with its first job and end with the context."""
        if worker_module.loading_main:
            raise StudyError(GUARD)
        pool = _ProcessPool(_greeting(evaluate), self)
        try:
            yield pool
        except BaseException:
            pool.close(kill=True)
            raise
        pool.close(kill=False)


def _greeting(evaluate: Evaluate) -> dict[str, Any]:
    """The first message to a worker: the function, and the script it needs where that defines it.

    The script is not loaded otherwise, so that one without the usual guard works too.
    """
    try:
        payload = pickle.dumps(evaluate)
    except Exception as error:
        raise StudyError(
            f"evaluate can't be sent to worker processes ({type(error).__name__}: {error}): "
            "define it and what it holds at the top of a module, or use workers=0"
        ) from error
    main: dict[str, Any] = {}
    if b"__main__" in payload:
        data = spawn.get_preparation_data("worker")
        main = {k: v for k, v in data.items() if k.startswith("init_main") or k == "dir"}
        if not any(k.startswith("init_main") for k in main):
            raise StudyError(
                "evaluate is defined in an interactive session, which worker processes can't "
                "import: define it in a module, or use workers=0"
            )
    return {"evaluate": payload, "main": main}


@dataclass
class _Turn:
    """A job and how often it was tried before."""

    job: Job
    tried: int = 0


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    pipe: Connection[Any, Any]
    ready: bool = False
    turn: _Turn | None = None
    since: float = field(default_factory=time.monotonic)

    @property
    def name(self) -> str:
        return f"process {self.process.pid}"

    def kill(self) -> None:
        """Ends the worker, and what it started, at once."""
        self.pipe.close()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()


def _start(greeting: dict[str, Any]) -> _Worker:
    ours, theirs = Pipe()
    paths = json.dumps([str(p) for p in sys.path])
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, paths, str(theirs.fileno()), str(os.getpid())],
            env={**os.environ, **ONE_THREAD},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=2,  # what a trial prints must not mix with the results on standard output
            process_group=0,  # the terminal's Ctrl-C goes to the driver alone
        )
    except OSError as error:
        raise StudyError(f"a worker process can't be started: {error}") from error
    finally:
        theirs.close()
    worker = _Worker(process, ours)
    with suppress(OSError):  # it died already: noticed when its pipe is read
        ours.send(greeting)
    return worker


class _ProcessPool(Pool):
    def __init__(self, greeting: dict[str, Any], settings: Processes) -> None:
        self._greeting, self._settings = greeting, settings
        self._workers: list[_Worker] = []

    def run(self, jobs: Iterable[Job]) -> Iterator[Outcome]:
        """Keeps every worker busy until the jobs are done."""
        source = iter(jobs)
        queue: deque[_Turn] = deque()
        more = True
        while True:
            idle = [w for w in self._workers if w.ready and w.turn is None]
            while more and len(queue) < (len(idle) if self._workers else 1):
                job = next(source, None)
                more = job is not None
                if job is not None:
                    queue.append(_Turn(job))
            self._fill(bool(queue) or more)
            for worker in idle[: len(queue)]:
                self._hand(worker, queue.popleft())
            if not queue and not more and not any(w.turn for w in self._workers):
                return
            for turn, outcome in self._collect():
                if outcome.readings is None and outcome.attempts <= self._settings.retries:
                    queue.appendleft(_Turn(turn.job, outcome.attempts))
                else:
                    yield outcome

    def _fill(self, wanted: bool) -> None:
        while wanted and len(self._workers) < self._settings.workers:
            self._workers.append(_start(self._greeting))

    def _hand(self, worker: _Worker, turn: _Turn) -> None:
        worker.turn, worker.since = turn, time.monotonic()
        with suppress(OSError):  # it died while idle: noticed when its pipe is read
            worker.pipe.send(turn.job.candidate)

    def _collect(self) -> list[tuple[_Turn, Outcome]]:
        """What happened within a moment: results, deaths and trials over their time."""
        waiting = {w.pipe: w for w in self._workers if w.turn or not w.ready}
        readable = wait(list(waiting), timeout=self._patience())
        out = []
        for pipe in readable:
            out += self._read(waiting[pipe])  # type: ignore[index]
        for worker in list(self._workers):
            if worker.pipe not in readable and (worker.turn or not worker.ready):
                out += self._check(worker)
        return out

    def _patience(self) -> float:
        limit = self._settings.trial_seconds
        if limit is None:
            return _POLL_SECONDS
        ends = [w.since + limit for w in self._workers if w.turn]
        return min([_POLL_SECONDS, *(max(e - time.monotonic(), 0.0) for e in ends)])

    def _read(self, worker: _Worker) -> list[tuple[_Turn, Outcome]]:
        try:
            kind, content = worker.pipe.recv()
        except (EOFError, OSError):
            return self._lost(worker, "")
        if kind == "ready":
            worker.ready = True
            return []
        if kind == "broken":
            last = content.strip().splitlines()[-1]
            hint = GUARD if "__main__" in last or "_mp_main_" in content else "see its module"
            raise StudyError(f"evaluate can't be loaded in a worker process: {last} ({hint})")
        readings, error, seconds = content
        turn = worker.turn
        assert turn is not None
        worker.turn = None
        return [(turn, Outcome(turn.job.id, readings, error, seconds, turn.tried + 1, worker.name))]

    def _check(self, worker: _Worker) -> list[tuple[_Turn, Outcome]]:
        limit = self._settings.trial_seconds
        took = time.monotonic() - worker.since
        if worker.turn and limit is not None and took > limit:
            return self._lost(worker, f"the trial took longer than {limit:g} s and was ended")
        if not worker.ready and took > _START_SECONDS:
            return self._lost(worker, f"was not ready within {_START_SECONDS:g} s")
        if worker.process.poll() is not None and not worker.pipe.poll():
            return self._lost(worker, "")
        return []

    def _lost(self, worker: _Worker, reason: str) -> list[tuple[_Turn, Outcome]]:
        """Removes a worker that died or must die; its trial has failed this time."""
        self._workers.remove(worker)
        if not reason:
            with suppress(subprocess.TimeoutExpired):
                worker.process.wait(timeout=1)  # its pipe closed: its end is near
            reason = f"worker {worker.name} {_how(worker.process.poll())}"
        worker.kill()
        turn = worker.turn
        if turn is None:
            raise StudyError(f"a worker process failed before its first trial: {reason}")
        seconds = time.monotonic() - worker.since
        outcome = Outcome(turn.job.id, None, reason, seconds, turn.tried + 1, worker.name)
        return [(turn, outcome)]

    def close(self, kill: bool) -> None:
        """Ends all workers: politely where they are idle."""
        workers, self._workers = self._workers, []
        for worker in workers:
            if not kill:
                worker.pipe.close()
        for worker in workers:
            if not kill:
                with suppress(subprocess.TimeoutExpired):
                    worker.process.wait(timeout=2)
            worker.kill()


def _how(code: int | None) -> str:
    """How a process ended, in words."""
    if code is None:
        return "closed its pipe"
    if code >= 0:
        return f"exited with status {code} during a trial"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    hint = " (out of memory?)" if name == "SIGKILL" else ""
    return f"was ended by {name}{hint}"
