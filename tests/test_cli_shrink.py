"""`espalier shrink` as its users meet it: a file with a model, weights, limits, one line of errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import espalier as esp
from espalier.cli import app, shrink
from espalier.cli.options import loaded_task
from espalier.cli.printing import print_explained
from quick import QUICK
from shrink_toys import Small, task, trained

pytest.importorskip("ortools")

OWN = """
import espalier as esp
from shrink_toys import Small, task


def make_model():
    return Small()


def sized(shape, classes):
    return Small(classes)
"""


def espalier(*words: str | Path) -> Any:
    return CliRunner().invoke(app, [str(w) for w in words])


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    (folder / "mine.py").write_text(OWN)
    state = {k: v.contiguous() for k, v in trained().state_dict().items()}
    save_file(state, folder / "w.safetensors")
    return folder / "mine.py"


def test_what_a_file_makes_stays_as_the_file_made_it(own: Path) -> None:
    """The line that names a task is told of the command's own copy: others may hold the object."""
    line = f"{own}:task"
    assert loaded_task(line).text == line
    assert task() is task()
    assert task().text == ""


def words(own: Path, *more: str | Path) -> list[str | Path]:
    return [
        "shrink", f"{own}:make_model", "--weights", own.with_name("w.safetensors"), "--task",
        f"{own}:task", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Timings are short; the options of the runtime are asked as ever."""

    def runtime(device: str, threads: int, batch: int) -> Any:
        return replace(QUICK, device=device, threads=threads, batch=batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(shrink.__globals__, "runtime", runtime)
        yield


@pytest.fixture(scope="module")
def finished(quick: None, own: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("cli") / "run"
    done = espalier(
        *words(own, "--max", "bytes=60%", "--budget", "1s", "--out", out, "--seed", "2", "--json"),
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    return out, json.loads(done.stdout)  # nothing but JSON on standard output


def test_the_answer_is_printed_as_json_and_its_files_are_there(
    finished: tuple[Path, Any],
) -> None:
    out, result = finished
    bound = result["question"]["limits"][0]["bound"]
    original = result["shrink"]["original"]["metrics"]["bytes"]["value"]
    assert bound == pytest.approx(0.6 * original)
    assert result["best"]["metrics"]["bytes"]["value"] <= bound
    assert {"onnx", "pt2", "safetensors", "card"} <= set(result["files"])
    assert all(Path(path).is_file() for path in result["files"].values())
    assert (out / "report.html").is_file()
    assert json.loads((out / "result.json").read_text())["best"] == result["best"]


def test_the_exported_file_reaches_the_accuracy_that_was_told(
    finished: tuple[Path, Any],
) -> None:
    """Read by ONNX Runtime alone, on the test split."""
    _, result = finished
    session = onnxruntime.InferenceSession(result["files"]["onnx"])
    name = session.get_inputs()[0].name
    right = total = 0
    for x, y in task().batches("test", 64):
        outputs = session.run(None, {name: x.contiguous().numpy()})[0]
        right, total = right + int((outputs.argmax(1) == y.numpy()).sum()), total + len(y)
    assert result["best"]["metrics"]["accuracy"]["value"] == pytest.approx(right / total)


@pytest.fixture
def no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exporting takes seconds, and is tested once."""
    nothing = esp.export.Exported({}, {})
    monkeypatch.setattr(esp.Shrunk, "export", lambda self: nothing)


@pytest.mark.usefixtures("no_files")
def test_the_same_command_again_needs_resume_and_then_pays_nothing(
    own: Path, finished: tuple[Path, Any]
) -> None:
    out, result = finished
    same = words(own, "--max", "bytes=60%", "--budget", "1s", "--out", out, "--seed", "2")
    refused = espalier(*same)
    assert refused.exit_code == 2
    assert "resume" in refused.stderr
    again = espalier(*same, "--resume", "--quiet")
    assert again.exit_code == 0, again.stderr
    assert "shrunk" in again.stdout
    assert result["best"]["id"] in again.stdout
    assert "limits kept as measured: bytes <=" in again.stdout


@pytest.mark.usefixtures("no_files")
def test_another_limit_reuses_the_profile(
    own: Path, finished: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, result = finished
    monkeypatch.setattr(esp.estimators.Calibrated, "_score", None)
    done = espalier(
        *words(own, "--max", "params=50%", "--budget", "1s", "--out", tmp_path / "b", "--seed", "2"),
        "--reuse", out, "--no-baselines", "--no-repair", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    reused = json.loads(done.stdout)
    assert reused["best"]["metrics"]["params"]["value"] <= 0.5 * sum(
        p.numel() for p in trained().parameters()
    )
    harms = [[r["harm"] for r in x["shrink"]["sensitivity"]] for x in (result, reused)]
    assert harms[0] == harms[1]


@pytest.mark.usefixtures("no_files")
def test_kinds_take_settings_and_the_report_repeats_them(own: Path, tmp_path: Path) -> None:
    kinds = "bits:8/4,sparsity:2:4"
    more = ("--decisions", kinds, "--budget", "1s", "--out", tmp_path / "run", "--json")
    done = espalier(*words(own, "--max", "bytes=24%", *more, "--no-baselines", "--no-repair"))
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    bits = [v for k, v in result["best"]["candidate"].items() if k.startswith("bits:")]
    assert 4 in bits  # with 8 everywhere there are more than 24%
    options = {r["decision"]: set() for r in result["shrink"]["sensitivity"]}
    for row in result["shrink"]["sensitivity"]:
        options[row["decision"]].add(row["option"])
    assert {frozenset(v) for k, v in options.items() if k.startswith("bits:")} == {
        frozenset({4, 8, 32})
    }
    assert options["sparsity:down"] == {"2:4", 1.0}
    assert f"--decisions {kinds} " in result["reproduce"]["command"]


def test_explain_lists_decisions_and_what_is_left_alone(own: Path) -> None:
    done = espalier(*words(own, "--explain", "--decisions", "width,depth,bits"))
    assert done.exit_code == 0, done.stderr
    for text in ("width:stem", "depth:block", "bits:fc", "the model's output"):
        assert text in done.stdout
    rows = json.loads(espalier(*words(own, "--explain", "--json")).stdout)
    stem = next(r for r in rows if r.get("decision") == "width:stem")
    assert stem["original"] == stem["options"][-1] == 8
    assert {"stem", "bn", "block.conv", "down"} <= set(stem["layers"])


def written(folder: Path, suffix: str) -> Path:
    """The trained model as a file of that kind."""
    path, x = folder / f"m{suffix}", torch.randn(2, 1, 8, 8)
    if suffix == ".onnx":
        path.write_bytes(esp.export.to_onnx(trained(), x, fast=True))
    else:
        batch = {0: torch.export.Dim("batch", min=1, max=4096)}
        torch.export.save(torch.export.export(trained(), (x,), dynamic_shapes=(batch,)), path)
    return path


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_a_file_of_a_graph_is_read_like_the_model(own: Path, tmp_path: Path, suffix: str) -> None:
    from espalier.flows.files import from_file

    path = written(tmp_path, suffix)
    model = from_file(path)
    x = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(model(x), trained()(x), rtol=1e-4, atol=1e-5)
    assert "espalier" not in {type(m).__module__.split(".")[0] for m in model.modules()}
    done = espalier("shrink", path, "--task", f"{own}:task", "--explain", "--json")
    assert done.exit_code == 0, done.stderr
    rows = json.loads(done.stdout)
    plain = json.loads(espalier(*words(own, "--explain", "--json")).stdout)
    kinds = [(r["kind"], r["options"]) for r in rows if "decision" in r]
    assert kinds == [(r["kind"], r["options"]) for r in plain if "decision" in r]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ([], "latency_ms=60%"),
        (["--max", "latency=1"], "latency_ms"),
        (["--max", "bytes"], "NAME=VALUE"),
        (["--max", "bytes=1%"], "least bytes that is reachable"),
        (["--max", "bytes=50%", "--decisions", "widths"], "Did you mean 'width'"),
        (["--max", "bytes=50%", "--decisions", ""], "unknown kind of decision"),
        (["--max", "bytes=50%", "--decisions", "bits:wieghts"], "like bits:8/4 or bits:weights/4"),
        (["--max", "bytes=50%", "--decisions", "bits:8,4"], "settings follow a colon: bits:8/4"),
        (["--max", "bytes=50%", "--solver", "relax:dna"], "Did you mean 'relax:dsa'"),
        (["--max", "bytes=50%", "--solver", "alocate"], "Did you mean 'allocate'"),
        (["--max", "bytes=50%", "--measure", "los"], "Did you mean 'loss'"),
        (["--max", "bytes=50%", "--budget", "soon"], "2min"),
        (["--max", "bytes=50%", "--weights", "absent.safetensors"], "absent.safetensors"),
        (["--max", "bytes=50%", "--reuse", "absent"], "absent"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    own: Path, more: list[str], expected: str, tmp_path: Path
) -> None:
    done = espalier(*words(own, *more, "--out", tmp_path / "run", "--quiet"))
    assert done.exit_code == 2, done.stderr
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1
    assert not done.stdout
    assert not (tmp_path / "run" / "ledger.sqlite").exists()


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("absent.py:make_model", "absent.py"),
        ("absent.onnx", "absent.onnx"),
        ("model.bin", ".pt2"),
        ("OWN:make_modle", "make_modle"),
    ],
)
def test_a_model_that_is_not_there_is_one_line(own: Path, model: str, expected: str) -> None:
    done = espalier("shrink", model.replace("OWN", str(own)), "--max", "bytes=50%")
    assert done.exit_code == 2
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_function_of_shape_and_classes_is_called_with_them(own: Path) -> None:
    done = espalier("shrink", f"{own}:sized", "--task", f"{own}:task", "--explain", "--json")
    assert done.exit_code == 0, done.stderr
    assert Small(10).fc.out_features == 10


def test_layers_left_alone_for_one_reason_are_told_together(capsys):
    rows = [{"layers": [f"conv{i}"], "kind": "width", "reason": "tied"} for i in range(9)]
    print_explained([*rows, {"layers": ["head"], "kind": "width", "reason": "output"}])
    told = " ".join(capsys.readouterr().out.split())
    assert told.count("tied") == 1
    assert "conv5" in told
    assert "conv6" not in told
    assert "3 more" in told
    assert "output" in told
