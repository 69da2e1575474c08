"""A study killed with SIGKILL at random instants, each time resumed to the end, loses nothing."""

from __future__ import annotations

import collections
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from espalier.study import Study

DRIVER = Path(__file__).with_name("study_driver.py")
KILLS = 20


def start(folder: Path, workers: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(DRIVER), str(folder), str(workers)], stdout=subprocess.PIPE, text=True
    )


def finish(folder: Path, workers: int) -> dict[str, Any]:
    driver = start(folder, workers)
    out, _ = driver.communicate(timeout=120)
    assert driver.returncode == 0
    found: dict[str, Any] = json.loads(out)
    return found


def calls(folder: Path) -> dict[tuple[str, str], int]:
    """How often each candidate was evaluated in each phase, from logs that evaluate writes."""
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    for phase in ("search", "final"):
        log = folder.with_suffix(f".{phase}")
        lines = log.read_text().splitlines() if log.exists() else []
        counts.update((phase, line.split()[0]) for line in lines)
    return counts


def ended(folder: Path) -> dict[tuple[str, str], Any]:
    """Finished trials as a reader sees them: by phase and candidate."""
    if not (folder / "ledger.sqlite").exists():
        return {}
    with Study.open(folder) as study:
        rows = [t for t in study.trials() if t.state == "done"]
    return {(t.phase, t.candidate.id): (t.id, t.metrics, t.finished) for t in rows}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[int, float]]:
    """The result of a run that nothing interrupts, serial; and how long each kind of run takes."""
    folder = tmp_path_factory.mktemp("whole")
    results, seconds = {}, {}
    for workers in (0, 1, 2):
        began = time.monotonic()
        results[workers] = finish(folder / str(workers), workers)
        seconds[workers] = time.monotonic() - began
    assert results[1] == results[2] == results[0], "workers must not change the result"
    assert len(results[0]["search"]) == 40
    assert len(results[0]["front"]) > 3
    return results[0], seconds


@pytest.mark.parametrize("kill", range(KILLS))
def test_killed_at_a_random_instant(
    tmp_path: Path, whole: tuple[dict[str, Any], dict[int, float]], kill: int
) -> None:
    expected, seconds = whole
    workers = (0, 1, 0, 2)[kill % 4]
    folder = tmp_path / "run"
    instant = random.Random().uniform(0.05, 1.0) * seconds[workers]
    driver = start(folder, workers)
    time.sleep(instant)
    driver.kill()
    driver.wait()
    time.sleep(0.7 if workers else 0)  # until its workers have noticed
    before, counted = ended(folder), calls(folder)
    resumed = finish(folder, (0, 2, 1, 0)[kill % 4])
    told = f"killed after {instant:.3f} s, {len(before)} trials done"
    assert resumed == expected, told
    after, recounted = ended(folder), calls(folder)
    for key, row in before.items():
        assert after[key] == row, f"{told}: a finished trial changed"
        assert recounted[key] == counted[key] == 1, f"{told}: a finished trial was run twice"
    assert len(after) == len(expected["search"]) + len(expected["final"])
