"""`espalier bench` as its users meet it: real processes, one-line errors, JSON and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from espalier.cli import app


def espalier(*words: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k != "ESPALIER_DATA"}
    return subprocess.run(
        [sys.executable, "-m", "espalier.cli", *map(str, words)],
        capture_output=True, text=True, timeout=120, check=False, env={**clean, **env},
    )  # fmt: skip


def test_with_no_data_at_all_it_runs_on_the_table_that_ships(tmp_path: Path) -> None:
    words = ("bench", "--strategies", "random,evolution", "--queries", "30", "--seeds", "6")
    done = espalier(*words, "--out", tmp_path / "a", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result["regret"]) == {"random", "evolution"}
    assert result["curves"]["evolution"]["queries"][-1] == 30
    assert Path(result["files"]["html"]).is_file()
    assert "bench --strategies" in result["command"]
    again = [*words, "--out", str(tmp_path / "a")]  # gone on with: nothing is left to run
    shown = CliRunner().invoke(app, again, env={"ESPALIER_DATA": None})
    assert shown.exit_code == 0, shown.stderr
    assert "12 of 12 runs done" in shown.stderr
    assert "than random search at equal budget (30 queries)" in shown.stdout
    assert "report: " in shown.stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--table", "digit"], "digits"),
        (["--strategies", "evoluton"], "evolution"),
        (["--strategies", "evolution:populaton=5"], "population"),
        (["--objectives", "val_ac,params"], "Did you mean"),
        (["--max", "param=5"], "Did you mean 'params'"),
        (["--max", "params=1"], "raise the limit"),
        (["--objectives", "test_acc"], "take val_acc"),
        (["--strategies", "evolution:population=few"], "got 'few'"),
        (["--estimators", "parms"], "params"),
        (["--table", "nb201"], "ESPALIER_DATA"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    words: list[str], expected: str, tmp_path: Path
) -> None:
    given = ["bench", *words, "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(app, given, env={"ESPALIER_DATA": None})
    assert done.exit_code == 2
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1
    assert not done.stdout


def test_the_help_teaches() -> None:
    shown = " ".join(espalier("bench", "--help", COLUMNS="200").stdout.split())
    for words in ("nb201:dataset=cifar100", "ESPALIER_DATA", "--seeds", "hypervolume"):
        assert words in shown


def test_the_help_loads_none_of_the_heavy_libraries() -> None:
    code = (
        "import sys, espalier.cli; heavy = ('torch', 'plotly', 'scipy', 'sklearn', 'numpy', "
        "'pyarrow'); print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.data
def test_a_real_table_with_limits_and_two_objectives(real_data: Path, tmp_path: Path) -> None:
    done = espalier(
        "bench", "--table", "nb201:dataset=cifar100", "--strategies", "random,nsga2:population=10",
        "--queries", "40", "--seeds", "6", "--objectives", "val_acc,lat_pixel3",
        "--max", "params=60%", "--estimators", "params", "--out", tmp_path / "b", "--json",
        ESPALIER_DATA=str(real_data),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result["hypervolume"]) == {"random", "nsga2:population=10"}
    assert 0.3 < result["estimators"]["params"]["kendall"]["value"] < 0.7
    assert result["limits"][0]["metric"] == "params"
