"""A shrink whose process was killed goes on with `resume`, to the answer that it would have given."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import espalier as esp
from espalier.study import Study
from shrink_driver import shrunk

pytest.importorskip("ortools")

DRIVER = Path(__file__).with_name("shrink_driver.py")


def signature(found: esp.Shrunk) -> list[Any]:
    """Every network, what it was at every stage of its repair, and its test."""
    stages = {
        row["id"]: [(s["stage"], s["quality"], s["kept"]) for s in row["stages"]]
        for row in found.to_json()["shrink"]["repair"]
    }
    return [
        (e.name, e.candidate, e.metrics["accuracy"].value, stages[e.candidate.id])
        for e in (found.best, *found.baselines)
    ]


def killed(folder: Path, phase: str, *more: str) -> dict[str, Any]:
    """What the study of a shrink has recorded, whose process was killed in that phase."""
    words = [sys.executable, str(DRIVER), str(folder), phase, *more]
    assert subprocess.run(words, timeout=300, check=False).returncode == -signal.SIGKILL
    with Study.open(folder) as study:
        return study.recorded()


def test_a_shrink_that_was_killed_twice_goes_on_to_the_same_answer(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = killed(folder, "what every option harms")
    assert any(key.startswith("harm/") for key in first)
    assert "repair seconds" not in first
    second = killed(folder, "random: fine-tuned", "resume")
    assert any(key.startswith("repair/") for key in second)
    assert "test/original" not in second
    found = signature(shrunk(folder, resume=True))
    with Study.open(folder) as study:
        whole = study.recorded()
    for before in (first, second):  # nothing that was finished is done again
        assert {key: whole[key] for key in before} == before
    assert found == signature(shrunk(tmp_path / "undisturbed"))
