"""The page of a race: whole, self-contained, harmless, honest; and drawn by a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest

from bench_toys import toy
from espalier.bench import page
from espalier.bench.criteria import criteria
from espalier.bench.figures import figures
from espalier.bench.protocol import race
from report_html import read

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
NASTY = "</script><script>alert(1)</script><b>"


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    table = toy(name="toy" + NASTY)
    found = race(table, "random,evolution,nsga2", 40, 8, objectives=["val_acc", "params"]).to_json()
    scores = {
        name: criteria(
            np.asarray(table.columns[name]), table.columns["test_acc"], resamples=20,
            complexity=table.columns["params"],
        )
        for name in ("val_acc", "params")
    }  # fmt: skip
    return {
        **found,
        "estimators": scores,
        "command": "espalier bench --table toy",
        "machine": {"cpu": "Example CPU", "cores": 2, "memory_gb": 8.0, "system": "Linux"},
        "versions": {"espalier": "0.1.0"},
    }


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    return race(toy(seconds=False), "random,nsga2", 20, 7).to_json()


def test_the_page_closes_loads_nothing_and_runs_nothing_foreign(result: dict[str, Any]) -> None:
    html = page.html(result)
    parsed = read(html)
    assert parsed.wrong == []
    assert parsed.loads == []
    assert parsed.handlers == []
    assert "<script>alert" not in html
    assert html.count("* plotly.js v") == 1
    levels = [int(e.tag[1]) for e in parsed.elements if re.fullmatch(r"h[1-6]", e.tag)]
    assert levels[0] == 1
    assert len(parsed.all("caption")) == len(parsed.all("table")) == 5
    for element in parsed.elements:
        if element.attributes.get("class") == "plot":
            assert element.attributes["aria-label"]


def test_it_says_what_must_be_said(result: dict[str, Any]) -> None:
    text = re.sub(r"<script.*?</script>|<style.*?</style>", "", page.html(result), flags=re.S)
    text = unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text)))
    for words in (
        "than random search at equal budget (40 queries)",
        "hypervolume",
        "Friedman",
        "Kendall's tau",
        "val_acc, test_acc",
        "Example CPU, 2 cores, 8 GB memory",
        "espalier bench --table toy",
        "made up for tests",
        "Virtual seconds are those of training every epoch",
        "Every candidate asked for is one query",
    ):
        assert words in text, words
    for sentence in result["verdicts"]:
        assert sentence in text


def test_every_figure_is_plotly_and_holds_every_strategy(
    result: dict[str, Any], single: dict[str, Any]
) -> None:
    views = figures(result)
    assert set(views) == {"regret", "volume", "ranks", "improvement"}
    assert [v["label"] for v in views["regret"]][-1] == "over virtual time"
    assert set(figures(single)) == {"regret", "ranks", "improvement"}
    for each in [*views.values(), *figures(single).values()]:
        for view in each:
            shown = json.loads(json.dumps(view["figure"], allow_nan=False))
            go.Figure(_plain(shown))
    lines = [t["name"] for t in views["regret"][0]["figure"]["data"] if t.get("name")]
    assert lines == ["random", "evolution", "nsga2"]


def _plain(value: Any) -> Any:
    """The figure with the page's own colour names put in, as its script does."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return "#123456" if isinstance(value, str) and value.startswith("@") else value


def test_three_files_are_written_and_agree(single: dict[str, Any], tmp_path: Path) -> None:
    files = page.write(single, tmp_path / "out")
    assert json.loads(files["json"].read_text())["regret"] == single["regret"]
    text = files["markdown"].read_text()
    assert "## Against random search" in text
    assert "| strategy |" in text
    plain = text.replace("\\", "")
    assert single["verdicts"]
    assert all(verdict in plain for verdict in single["verdicts"])
    assert "The table knows no training times" in text
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "report.html",
        "report.md",
        "result.json",
    ]


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on the PATH")
def test_a_browser_draws_it(result: dict[str, Any], tmp_path: Path) -> None:
    path = page.write(result, tmp_path)["html"]
    picture = tmp_path / "page.png"
    done = subprocess.run(
        [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--disable-dev-shm-usage", "--hide-scrollbars", "--enable-logging=stderr",
            "--virtual-time-budget=8000", f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=1200,6000", f"--screenshot={picture}", "--dump-dom", path.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr
    assert "data-error" not in done.stdout[:2000]
    assert 'data-drawn="4"' in done.stdout[:2000]
    assert picture.stat().st_size > 50_000


def test_the_code_of_the_how_to_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[1] / "docs" / "howto" / "bench.md").read_text()
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S):
        exec(compile(block, "bench.md", "exec", dont_inherit=True), names)
    assert names["found"].to_json()["significance"]["mine"]["better"]
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()
