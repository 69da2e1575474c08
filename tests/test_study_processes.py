"""Executors: the same numbers everywhere; workers that die, hang or outlive their driver."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import study_toys as toys
from espalier.errors import StudyError
from espalier.problem import Reading
from espalier.space import Candidate
from espalier.study import Processes, Serial, Study
from espalier.study.executor import Executor, Job, Outcome
from espalier.testing.executor import check_executor

HERE = Path(__file__).parent


@pytest.mark.parametrize("executor", [Serial(), Serial(retries=0), Processes(2, retries=2)])
def test_executors_pass_their_suite(executor: Executor) -> None:
    check_executor(executor)


def run(executor: Executor, evaluate: Any, wanted: list[Candidate]) -> list[Outcome]:
    with executor.open(evaluate) as pool:
        outcomes = list(pool.run([Job(i, c) for i, c in enumerate(wanted)]))
    assert not workers_of(os.getpid()), "workers end with their pool"
    return sorted(outcomes, key=lambda o: o.id)


def workers_of(pid: int) -> list[psutil.Process]:
    """Worker processes that a process has, by their command."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        try:
            if "espalier.study.worker" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


def wait_until(true: Any, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


# --- workers in trouble -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "said"),
    [("kill", "SIGKILL (out of memory?)"), ("abort", "SIGABRT"), ("exit", "status 7")],
)
def test_a_worker_that_dies_costs_a_retry(tmp_path: Path, what: str, said: str) -> None:
    wanted = toys.candidates(6)
    once = toys.Trouble(tmp_path, what)
    outcomes = run(Processes(2), once, wanted)
    assert [o.readings for o in outcomes] == [toys.evaluate(c) for c in wanted]
    assert [o.attempts for o in outcomes] == [1, 1, 1, 2, 1, 1]
    always = toys.Trouble(tmp_path, what, always=True)
    outcomes = run(Processes(2), always, wanted)
    bad = outcomes.pop(3)
    assert bad.readings is None
    assert bad.attempts == 2
    assert said in bad.error
    assert all(o.readings for o in outcomes), "the other trials are not touched"


def test_a_trial_that_hangs_is_ended(tmp_path: Path) -> None:
    wanted = toys.candidates(5)
    executor = Processes(2, trial_seconds=2, retries=0)
    outcomes = run(executor, toys.Trouble(tmp_path, "hang"), wanted)
    assert "longer than 2 s" in outcomes[3].error
    assert [o.readings is None for o in outcomes] == [False, False, False, True, False]


@pytest.mark.parametrize("workers", [0, 1])
def test_exceptions_of_any_kind_are_results(tmp_path: Path, workers: int) -> None:
    wanted = toys.candidates(5)
    outcomes = run(toys.executor(workers), toys.Trouble(tmp_path, "raise", always=True), wanted)
    assert "RecursionError: too deep" in outcomes[3].error
    assert outcomes[3].attempts == 2
    assert all(o.readings for i, o in enumerate(outcomes) if i != 3)


def test_a_lost_worker_is_recorded_as_a_failed_trial(tmp_path: Path) -> None:
    with Study.create(tmp_path / "run", toys.IDENTITY) as study:
        trouble = toys.Trouble(tmp_path, "kill", always=True)
        trials = study.map("final", toys.candidates(5), trouble, executor=Processes(2))
    assert [t.state for t in trials] == ["done", "done", "done", "failed", "done"]
    assert "SIGKILL" in trials[3].error
    assert trials[3].attempts == 2


# --- what can't be sent -----------------------------------------------------------------------


class FailsToLoad:
    """Pickles, and can't be unpickled."""

    def __reduce__(self) -> Any:
        return int, ("not a number",)


def test_what_workers_cannot_have_is_refused() -> None:
    with (
        pytest.raises(StudyError, match="can't be sent to worker processes"),
        Processes(1).open(lambda c: toys.evaluate(c)),
    ):
        pass
    with (
        pytest.raises(StudyError, match="can't be loaded in a worker process: ValueError"),
        Processes(1).open(FailsToLoad()) as pool,  # type: ignore[arg-type]
    ):
        list(pool.run([Job(0, toys.candidates(1)[0])]))
    with pytest.raises(StudyError, match="at least 1 worker"):
        Processes(0)
    with pytest.raises(StudyError, match="above 0"):
        Processes(1, trial_seconds=0)


class DiesAtLoading:
    """Kills the worker that loads it."""

    def __reduce__(self) -> Any:
        return os.abort, ()


def test_a_worker_that_can_not_start_ends_the_search() -> None:
    with (
        pytest.raises(StudyError, match="before its first trial"),
        Processes(2).open(DiesAtLoading()) as pool,  # type: ignore[arg-type]
    ):
        list(pool.run([Job(0, toys.candidates(1)[0])]))
    assert not workers_of(os.getpid())


def script(tmp_path: Path, text: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "main_script.py"
    path.write_text(f"import sys; sys.path.insert(0, {str(HERE)!r})\n" + textwrap.dedent(text))
    command = [sys.executable, str(path), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)


def test_a_script_without_the_guard_works_when_it_defines_nothing(tmp_path: Path) -> None:
    done = script(
        tmp_path,
        """
        import study_toys as toys
        from espalier.study import Study
        with Study.create("run", toys.IDENTITY) as study:
            print(len(toys.search(study, workers=2, trials=10)))
        """,
    )
    assert done.stdout == "10\n", done.stderr


DEFINES = """
    import study_toys as toys
    from espalier.study import Study

    def mine(candidate):
        print("a print of the user")
        return toys.evaluate(candidate)

    def main():
        with Study.create("run", toys.IDENTITY) as study:
            print(len(toys.search(study, mine, workers=1, trials=4)))
"""


def test_a_function_of_the_script_works_with_the_guard(tmp_path: Path) -> None:
    done = script(tmp_path, DEFINES + "\n    if __name__ == '__main__': main()\n")
    assert done.stdout == "4\n", done.stderr
    assert done.stderr.count("a print of the user") == 4, "prints of workers go to stderr"


def test_a_function_of_the_script_without_the_guard_is_explained(tmp_path: Path) -> None:
    done = script(tmp_path, DEFINES + "\n    main()\n")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "espalier.errors.StudyError" in last
    assert "if __name__ == '__main__'" in last


# --- one thread -------------------------------------------------------------------------------


def threads(candidate: Candidate) -> dict[str, Reading]:
    """What a library would use here, and a sum whose bits depend on the number of threads."""
    import torch

    x = torch.linspace(0, 1, 300_001) ** 2
    y = torch.matmul(x[:250_000].reshape(500, 500), x[:250_000].reshape(500, 500)).sum()
    return {
        "torch": Reading(torch.get_num_threads()),
        "omp": Reading(float(os.environ["OMP_NUM_THREADS"])),
        "sum": Reading(float(y) + float(x.sum())),
        "numpy": Reading(float(np.linalg.norm(np.outer(np.arange(300), np.arange(300)) ** 0.5))),
    }


def test_serial_and_processes_compute_the_same_bits_on_one_thread() -> None:
    import torch

    before = torch.get_num_threads(), dict(os.environ)
    try:
        torch.set_num_threads(2)
        wanted = toys.candidates(2)
        serial, processes = (run(e, threads, wanted) for e in (Serial(), Processes(1)))
        assert [o.readings for o in serial] == [o.readings for o in processes]
        assert serial[0].readings is not None
        assert serial[0].readings["torch"].value == serial[0].readings["omp"].value == 1
        assert torch.get_num_threads() == 2, "restored"
        assert dict(os.environ) == before[1], "restored"
    finally:
        torch.set_num_threads(before[0])


def test_evaluate_is_sent_once_to_each_worker() -> None:
    assert pickle.loads(pickle.dumps(toys.evaluate)) is toys.evaluate
    outcomes = run(Processes(2), Counts(), toys.candidates(8))
    by_worker: dict[str, list[float]] = {}
    for outcome in outcomes:
        assert outcome.readings is not None
        by_worker.setdefault(outcome.worker, []).append(outcome.readings["calls"].value)
    for calls in by_worker.values():
        assert sorted(calls) == [float(i + 1) for i in range(len(calls))], "it keeps its state"


class Counts:
    """Counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, candidate: Candidate) -> dict[str, Reading]:
        """How many calls there were."""
        self.calls += 1
        return {"calls": Reading(float(self.calls))}


# --- drivers that end -------------------------------------------------------------------------

DRIVER = """
    import sys
    from pathlib import Path
    import study_toys as toys
    from espalier.study import Study
    folder, rounds, workers = sys.argv[1:]
    try:
        with Study.create(folder, toys.IDENTITY) as study:
            work = toys.Logged(Path(folder + ".log"), int(rounds))
            toys.search(study, work, workers=int(workers))
    except KeyboardInterrupt:
        print("interrupted")
        sys.exit(130)
"""


def start(tmp_path: Path, rounds: int, workers: int) -> subprocess.Popen[str]:
    path = tmp_path / "driver.py"
    path.write_text(f"import sys; sys.path.insert(0, {str(HERE)!r})\n" + textwrap.dedent(DRIVER))
    return subprocess.Popen(
        [sys.executable, str(path), str(tmp_path / "run"), str(rounds), str(workers)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # as from a terminal: a signal goes to the whole group
    )


def logged(tmp_path: Path) -> int:
    log = tmp_path / "run.log"
    return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_ends_cleanly_and_a_resume_completes(tmp_path: Path, workers: int) -> None:
    driver = start(tmp_path, 1000, workers)
    wait_until(lambda: logged(tmp_path) >= 3)
    mine = workers_of(driver.pid)
    os.killpg(driver.pid, signal.SIGINT)
    out, err = driver.communicate(timeout=30)
    assert (driver.returncode, out) == (130, "interrupted\n"), err
    assert err == "", "no traceback of driver or worker"
    assert len(mine) == workers
    wait_until(lambda: not any(w.is_running() for w in mine))
    with Study.open(tmp_path / "run") as study:
        trials = study.trials()
        assert {t.state for t in trials} <= {"done", "waiting"}
        assert sum(t.state == "done" for t in trials) >= 1
    with Study.resume(tmp_path / "run", toys.IDENTITY) as study:
        resumed = toys.result(toys.search(study, toys.Logged(tmp_path / "run.log", 1000)))
    with Study.create(tmp_path / "whole", toys.IDENTITY) as study:
        assert toys.result(toys.search(study, toys.Logged(tmp_path / "x.log", 1000))) == resumed


def test_workers_end_when_their_driver_is_killed(tmp_path: Path) -> None:
    driver = start(tmp_path, 20_000_000, 2)  # trials of minutes
    wait_until(lambda: len(workers_of(driver.pid)) == 2)
    mine = workers_of(driver.pid)
    with Study.open(tmp_path / "run") as study:
        wait_until(lambda: sum(t.state == "running" for t in study.trials()) == 2)
    driver.kill()
    driver.communicate(timeout=30)
    wait_until(lambda: not any(w.is_running() for w in mine))
