"""The command line as its users meet it: real processes, real files, real signals."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from espalier.cli import app

OWN = """
import espalier as esp
from espalier.costs import calibration, context, pace, runtime
from espalier.flows import job
from espalier.flows.plan import Plan

# how latency is timed has tests of its own (see quick_tables in conftest.py)
timed = runtime.clock
runtime.clock = lambda run, **how: timed(run, **{**how, "seconds": 0.02, "precision": 0.5})
pace.Pace.now = lambda self: 1.0
context._UNSURE = float("inf")
calibration.Calibration.__init__.__kwdefaults__.update(fit=4, held_out=3)

# how epochs are planned has tests of its own
job.make_plan = lambda *given: Plan(
    supernet_epochs=3, trials=12, population=6, finalists=1, final_epochs=4
)


def task():
    return esp.tasks.images("digits", train=96, validation=64, test=96)


def family(shape, classes):
    return esp.nets.MobileNet(
        shape, classes, 8, stem=8, widths=((8, 16), 16, 32), depth=(1, 2), kernel=3,
        expansion=(2, 3), head=64,
    )
"""


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "espalier.cli", *map(str, words)]


def espalier(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*words), capture_output=True, text=True, timeout=300, check=False)


def here(*words: str | Path) -> Any:
    """In this process: what one of its own adds is shown by the other tests."""
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="session")  # a slow test comes long before the others of this file
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "mine.py"
    path.write_text(OWN)
    return path


def search_words(own: Path, out: Path, workers: int = 2) -> list[Any]:
    return [
        "search", "--task", f"{own}:task", "--family", f"{own}:family", "--max", "params=20k",
        "--max", "macs=1M", "--budget", "12 trials", "--seed", "1", "--workers", workers, "--out", out,
        "--json",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def finished(own: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("cli") / "run"
    done = espalier(*search_words(own, out, workers=0))
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout)  # nothing but JSON on standard output


def answer(result: dict[str, Any]) -> list[Any]:
    """What must not depend on interruptions: candidates and their accuracy."""
    rows = [result["best"], *result["front"], *result["baselines"]]
    return [(e["name"], e["id"], e["start"], e["metrics"]["accuracy"]["value"]) for e in rows]


def test_search_prints_the_result_as_json(finished: tuple[Path, dict[str, Any]]) -> None:
    out, result = finished
    assert {"best", "front", "baselines", "budget", "seconds", "files"} <= set(result)
    assert result["budget"]["kept"] == {"params": True, "macs": True}
    assert all(Path(path).is_file() for path in result["files"].values())
    assert (out / "report.html").is_file()
    assert (out / "report.md").is_file()
    assert json.loads((out / "result.json").read_text())["best"] == result["best"]


def test_measure_prices_the_exported_file_the_same_way(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    _, result = finished
    done = here("measure", result["files"]["onnx"], "--json")
    assert done.exit_code == 0, done.stderr
    priced = json.loads(done.stdout)
    assert priced["macs"]["value"] == result["best"]["metrics"]["macs"]["value"]
    assert priced["latency_ms"]["how"] == "measured"
    assert priced["latency_ms"]["value"] > 0
    table = here("measure", result["files"]["onnx"])
    assert "latency_ms" in table.stdout


def test_report_writes_the_page_again(finished: tuple[Path, dict[str, Any]]) -> None:
    out, _ = finished
    before = (out / "report.html").read_bytes()
    (out / "report.html").unlink()
    done = here("report", out, "--json")
    assert done.exit_code == 0, done.stderr
    assert (out / "report.html").read_bytes() == before


@pytest.mark.slow
def test_killed_at_random_instants_it_resumes_to_the_same_answer(
    own: Path, finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """SIGKILL three times in one study, in another phase each time, then to the end. The ledger
    itself is killed at twenty instants in test_study_kill.py; here it is the whole flow: training,
    workers, measuring."""
    rng = random.Random(7)
    words = [w for w in search_words(own, tmp_path / "run", workers=1) if w != "--json"]
    resumed: list[str] = []
    for phase in ("training the supernet", "search: nsga2", "training to the end"):
        process = subprocess.Popen(command(*words, *resumed), stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        assert any(phase in line for line in process.stderr), f"it never came to {phase}"
        time.sleep(rng.uniform(0, 0.5))
        process.kill()
        process.communicate()
        resumed = ["--resume"]
    # any number of workers gives the same answer, and none start the quickest
    done = espalier(*search_words(own, tmp_path / "run", workers=0), *resumed)
    assert done.returncode == 0, done.stderr
    assert answer(json.loads(done.stdout)) == answer(finished[1])


def test_ctrl_c_ends_cleanly_and_says_how_to_go_on(own: Path, tmp_path: Path) -> None:
    words = [w for w in search_words(own, tmp_path / "run") if w != "--json"]
    process = subprocess.Popen(command(*words), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "training the supernet" in line:
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            break
    rest = process.stderr.read()
    assert process.wait(60) == 130
    assert "--resume" in rest
    assert "Traceback" not in rest
    again = here("report", tmp_path / "run")
    assert again.exit_code == 2
    assert "--resume" in again.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["search", "--task", "digit"], "digits"),
        (["search", "--family", "mobilnet"], "mobilenet"),
        (["search", "--max", "latency=1"], "latency_ms"),
        (["search", "--max", "params"], "NAME=VALUE"),
        (["search", "--max", "params=1k", "--max", "params=2k"], "twice"),
        (["search", "--family", "resnet", "--max", "params=5"], "smallest reachable"),
        (["search", "--budget", "soon"], "2min"),
        (["search", "--task", "absent.py:task"], "absent.py"),
        (["search", "--task", "nowhere/"], "nowhere"),
        (["measure", "absent.onnx"], "absent.onnx"),
        (["report", "absent"], "absent"),
        (["dashboard", "absent"], "absent"),
        (["recipe", "show", "default-serch"], "default-search"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    words: list[str], expected: str, tmp_path: Path
) -> None:
    # in this process: what a process of its own adds is shown by the broken file below
    extra = ["--out", str(tmp_path / "run")] if words[0] == "search" else []
    done = CliRunner().invoke(app, [*words, *extra])
    assert done.exit_code == 2
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1
    assert not done.stdout
    assert not (tmp_path / "run" / "ledger.sqlite").exists()


def test_a_corrupt_onnx_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"not a network")
    done = espalier("measure", path)
    assert done.returncode == 2
    assert "broken.onnx" in done.stderr
    assert done.stderr.count("\n") == 1


def test_recipes_are_listed_and_shown() -> None:
    listed = here("recipe", "list", "--json")
    assert "default-search" in {r["name"] for r in json.loads(listed.stdout)}
    assert "NSGA-II" in here("recipe", "show", "default-search").stdout


def test_help_and_import_do_not_load_torch() -> None:
    code = "import sys, espalier, espalier.cli; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    shown = espalier("search", "--help")
    assert "--max" in shown.stdout


def test_the_wait_policy_is_set_before_torch_loads() -> None:
    code = "import os, espalier; print(os.environ['OMP_WAIT_POLICY'])"
    clean = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=clean
    )
    assert done.stdout.strip() == "passive"
