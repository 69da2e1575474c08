"""Writing the report: files, JSON both ways, Markdown, folders that can't be written."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from espalier import report
from espalier.errors import StudyError
from report_html import read
from report_sample import sample_result


def test_writes_all_files_and_json_comes_back_the_same(tmp_path: Path) -> None:
    raw = sample_result()
    paths = report.write(raw, tmp_path / "new" / "folder")
    assert {"html", "markdown", "json"} <= set(paths)
    assert all(p.stat().st_size > 0 for p in paths.values())
    assert json.loads(paths["json"].read_text()) == raw
    assert not list(paths["html"].parent.glob(".*"))


def test_the_written_json_makes_the_same_page(tmp_path: Path) -> None:
    first = report.write(sample_result(), tmp_path / "a")
    again = report.write(json.loads(first["json"].read_text()), tmp_path / "b")
    for kind, path in first.items():
        assert path.read_bytes() == again[kind].read_bytes(), kind


def test_json_is_strict_whatever_the_numbers(tmp_path: Path) -> None:
    raw = sample_result()
    raw["trials"][0] |= {"accuracy": math.nan, "latency_ms": np.float32(0.5), "params": np.int64(3)}
    raw["question"]["family"]["size"] = math.inf
    raw["extra"] = {"array": np.arange(3), "path": Path("x"), 1: (True, None)}
    text = report.write(raw, tmp_path)["json"].read_text()

    def refuse(name: str) -> Any:
        raise AssertionError(name)

    found = json.loads(text, parse_constant=refuse)
    assert found["trials"][0]["accuracy"] is None
    assert found["trials"][0]["latency_ms"] == 0.5
    assert found["extra"] == {"array": [0, 1, 2], "path": "x", "1": [True, None]}
    assert "infinitely many candidates" in (tmp_path / "report.html").read_text()


def test_markdown_has_the_answer_and_whole_tables(tmp_path: Path) -> None:
    raw = sample_result()
    raw["baselines"][0]["name"] = "hand | `x` <b>"
    raw["best"]["candidate"]["fence"] = "```"
    text = report.write(raw, tmp_path)["markdown"].read_text()
    assert text.startswith("# 0.283 ms of 0.3 ms, 51.4k of 60k parameters")
    assert "| scaled" not in text
    assert r"hand \| \`x\` \<b\>" in text
    assert text.count("```") % 2 == 0
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.M)
    assert len(blocks) == 5
    for block in blocks:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1, block


def test_the_still_figure_is_an_svg_without_a_date(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib draws the still figure; it is optional")
    text = report.write(sample_result(), tmp_path)["figure"].read_text()
    assert text.count("<svg") == 1
    assert "dc:date" not in text
    assert "front.svg" in (tmp_path / "report.md").read_text()


def test_without_matplotlib_the_still_figure_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    paths = report.write(sample_result(), tmp_path)
    assert set(paths) == {"html", "markdown", "json"}
    assert "front.svg" not in paths["markdown"].read_text()


def test_a_folder_that_can_not_be_written_is_one_clear_line(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("not a folder")
    with pytest.raises(StudyError, match=r"can't write the report to .*file.*: .*folder"):
        report.write(sample_result(), blocker)
    assert blocker.read_text() == "not a folder"


def test_a_full_disk_leaves_the_old_report_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = report.write(sample_result(0), tmp_path)
    before = paths["html"].read_bytes()

    def full(self: Path, data: bytes) -> int:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StudyError, match="No space left on device"):
        report.write(sample_result(1), tmp_path)
    assert paths["html"].read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_the_page_of_another_seed_differs_but_is_as_valid(tmp_path: Path) -> None:
    pages = [report.write(sample_result(s), tmp_path / str(s))["html"].read_text() for s in (0, 1)]
    assert pages[0] != pages[1]
    assert read(pages[1]).wrong == []


def test_files_are_named_as_seen_from_the_report(tmp_path: Path) -> None:
    raw = sample_result()
    raw["files"] = {
        "onnx": str(tmp_path / "run" / "export" / "best.onnx"),
        "other": "/elsewhere/x.pt2",
    }
    paths = report.write(raw, tmp_path / "run")
    shown = [e.text for e in read(paths["html"].read_text()).all("code")]
    assert "export/best.onnx" in shown
    assert "/elsewhere/x.pt2" in shown
    assert json.loads(paths["json"].read_text())["files"] == raw["files"]


def test_the_result_says_what_was_made_best(tmp_path: Path) -> None:
    raw = sample_result()
    for entry in (raw["best"], *raw["front"], *raw["baselines"]):
        value = entry["metrics"]["accuracy"]["value"]
        entry["metrics"]["recall"] = {
            "value": value / 2,
            "unit": "share",
            "how": "measured",
            "split": "test",
        }
    raw["quality"] = "recall"
    text = report.write(raw, tmp_path)["markdown"].read_text()
    assert text.splitlines()[0].endswith("49.0% test recall")
