"""What users meet at the edges of a shrink: own tasks, missing parts, files, how to run it again."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import espalier as esp
from espalier.cli.options import loaded_task, one_line_errors
from espalier.cli.printing import print_json
from espalier.compress import Pretrained
from espalier.costs import calibration as tables
from espalier.errors import DataError, EspalierError, ExportError, NotInTimeError, StudyError
from espalier.estimators.calibration import Calibrated
from espalier.flows import solving
from espalier.flows.files import from_file
from espalier.flows.given import given_model, load_weights
from espalier.problem import Limit
from espalier.report.reading import Result
from espalier.solvers.allocate.program import Program
from espalier.space import Space, ordinal
from espalier.study import Study
from quick import QUICK
from shrink_toys import Small, task, trained

pytestmark = pytest.mark.usefixtures("quick_tables")

pytest.importorskip("ortools")

NAMED = "digits:train=200,validation=100,test=100"


def tiny(out: Path, model: nn.Module | None = None, own: Any = None, **changes: Any) -> esp.Shrunk:
    settings: dict[str, Any] = {
        "within": {"bytes": "60%"},
        "decisions": "width:multiple=2/steps=4",
        "solver": "allocate",
        "recipe": esp.Recipe(epochs=1, lr=0.02),
        "budget": "10 trials",
        "on": QUICK,
        "out": out,
    }
    return esp.shrink(model or trained(), own or task(), **{**settings, **changes})


class Distances(esp.tasks.TensorTask):
    """How far from a class's number: less is better."""

    metrics = (esp.Metric("mae", goal="min", how="measured"),)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.l1_loss(outputs[:, 0], targets)

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        return {"mae": self.loss(outputs, targets)}  # a tensor, as users write it


def own(kind: type[esp.tasks.TensorTask], top: int = 10, outputs: int = 1, **made: Any) -> Any:
    rng = torch.Generator().manual_seed(0)
    splits = {}
    for name, size in (("train", 60), ("validation", 30), ("test", 30)):
        y = torch.randint(0, top, (size,), generator=rng)
        x = torch.rand(size, 1, 8, 8, generator=rng) + y[:, None, None, None]
        splits[name] = (x, y if outputs > 1 else y.float())
    return kind(splits, outputs=outputs, name="own", **made)


def test_less_is_better_in_the_report_where_the_metric_says_so(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 1))
    found = tiny(tmp_path / "run", model, own(Distances))
    told = found.to_json()
    assert told["goal"] == "min"
    assert not Result(told).rising
    tests = {e.name: e.metrics["mae"].value for e in (found.best, *found.baselines)}
    page = (tmp_path / "run" / "report.md").read_text() if found.report() else ""
    assert len(tests) > 1
    for name, value in tests.items():
        ahead = value < found.best.metrics["mae"].value
        assert (f"{name.capitalize()} is ahead" in page) == ahead


def test_a_measure_that_lacks_a_metric_is_told(tmp_path: Path) -> None:
    class Lacking(Distances):
        def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
            return {"error": 0.5}

    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 1))
    with pytest.raises(DataError, match="has the metrics mae, but its measure gives error"):
        tiny(tmp_path / "run", model, own(Lacking))


def test_targets_that_do_not_fit_the_model_are_told_at_once(tmp_path: Path) -> None:
    class Classes(Distances):
        metrics = (esp.Metric("accuracy", goal="max", how="measured"),)

        def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return functional.cross_entropy(outputs, targets)

        def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
            return {"accuracy": float((outputs.argmax(1) == targets).float().mean())}

    wrong = own(Classes, outputs=10)
    for split, (x, y) in wrong._splits.items():
        wrong._splits[split] = (x, y + 100)
    with pytest.raises(EspalierError, match="the loss of the task own fails on the model's output"):
        tiny(tmp_path / "run", own=wrong)


def test_without_the_solver_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "ortools"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ortools", None)
    with pytest.raises(EspalierError, match=r"pip install 'espalier\[compress\]'"):
        tiny(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_report_says_the_task_as_it_was_given(tmp_path: Path) -> None:
    found = tiny(tmp_path / "a", own=NAMED, repair=False, baselines=False)
    assert f"--task {NAMED}" in found.to_json()["reproduce"]["command"]
    assert repr(NAMED) in found.to_json()["reproduce"]["python"]
    given = tiny(tmp_path / "b", repair=False, baselines=False)
    assert "--task TASK" in given.to_json()["reproduce"]["command"]


def test_a_share_that_says_a_whole_number_allows_it() -> None:
    limit = Limit("params", 0.7, relative=True).resolve(1400)
    assert 0.7 * 1400 < 980 == limit.bound
    assert limit.violation([980.0])[0] == 0


def test_a_study_goes_on_under_its_own_limit_and_recipe(tmp_path: Path) -> None:
    tiny(tmp_path / "run", within={"bytes": "60.4%"}, repair=False, baselines=False)
    asked = {"repair": False, "baselines": False, "resume": True}
    with pytest.raises(StudyError, match="limits"):
        tiny(tmp_path / "run", within={"bytes": "59.6%"}, **asked)
    recipe = esp.Recipe(epochs=2, lr=0.02)
    with pytest.raises(StudyError, match="recipe"):
        tiny(tmp_path / "run", within={"bytes": "60.4%"}, recipe=recipe, **asked)


def test_who_stops_is_told_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def stopped() -> None:
        with one_line_errors(), Study.create(tmp_path / "study", {}, {}, 0):
            raise KeyboardInterrupt

    with pytest.raises(BaseException) as end:  # noqa: PT011 - typer's own
        stopped()
    assert end.value.exit_code == 130
    assert f"--out {tmp_path / 'study'} and --resume" in capsys.readouterr().err


def test_where_no_width_is_decided_the_baseline_is_not_called_one(tmp_path: Path) -> None:
    found = tiny(tmp_path / "run", decisions="sparsity:50%", within={"stored_bytes": "80%"})
    names = {e.name for e in (found.best, *found.baselines)}
    assert "uniform" in names
    assert "uniform width" not in names


def test_a_search_knows_the_pace_of_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table is made at a third of the pace at which the original was measured."""
    line = tables._line
    monkeypatch.setattr(tables, "_line", lambda *given: tuple(3 * v for v in line(*given)))
    found = tiny(
        tmp_path / "run",
        wide(),
        within={"latency_ms": "60%"},
        decisions="width:multiple=8/steps=4,depth",
        solver="search",
        repair=False,
        baselines=False,
    )
    assert (
        found.best.metrics["latency_ms"].value <= 0.6 * found.original.metrics["latency_ms"].value
    )


def wide() -> nn.Module:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 48, 3, padding=1), nn.Conv2d(48, 48, 3, padding=1)
            self.c, self.head = nn.Conv2d(48, 64, 3, 2, 1), nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.a(x))
            return self.head(torch.relu(self.c(torch.relu(x + self.b(x)))).mean((2, 3)))

    torch.manual_seed(0)
    return Wide()


def test_a_program_out_of_time_at_one_limit_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solve, calls = Program.solve, []

    def late(self: Program, *given: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise NotInTimeError("no candidate was found in 1 s, nor proved absent")
        return solve(self, *given, **named)

    monkeypatch.setattr(solving.Program, "solve", late)
    made = tiny(
        tmp_path / "run", wide(), within={"latency_ms": "80%"}, repair=False, baselines=False
    )
    assert made.best.metrics["latency_ms"].value <= 0.8 * made.original.metrics["latency_ms"].value


def test_harm_is_read_on_any_number_of_images() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10)
    )
    digits = esp.tasks.images("digits", train=400, validation=100, test=100)
    family = Pretrained(model, next(iter(digits.batches("train", 2)))[0])
    harms = [
        Calibrated(family, digits, images=n).harm([family.original])[0] for n in (256, 257, 258)
    ]
    assert np.isfinite(harms).all()
    assert harms[0] == harms[1]


def test_a_model_that_can_not_be_exported_has_a_report(tmp_path: Path) -> None:
    class Guarded(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x / 255 if x.max() > 100 else x)

    model = Guarded()
    model.load_state_dict(trained().state_dict())
    found = tiny(tmp_path / "run", model, repair=False, baselines=False)
    with pytest.raises(ExportError, match="the report is"):
        found.publish()
    assert "Not exported" in (tmp_path / "run" / "report.html").read_text()


POOLS = {
    "max of a line": (nn.Conv1d(3, 8, 3, padding=1), nn.MaxPool1d(3, 1, 1)),
    "mean of a line": (nn.Conv1d(3, 8, 3, padding=1), nn.AvgPool1d(2)),
    "global mean of a line": (nn.Conv1d(3, 8, 3, padding=1), nn.AdaptiveAvgPool1d(1)),
    "dilated": (nn.Conv2d(3, 8, 3, padding=1), nn.MaxPool2d(3, 1, 1, dilation=2)),
    "max of a volume": (nn.Conv3d(3, 8, 3, padding=1), nn.MaxPool3d(2)),
    "global mean of a volume": (nn.Conv3d(3, 8, 3, padding=1), nn.AdaptiveAvgPool3d(1)),
}


@pytest.mark.parametrize("name", POOLS)
def test_pooling_is_read_from_a_file_as_it_runs(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    conv, pool = POOLS[name]
    dims = conv.weight.dim() - 2
    x = torch.randn(2, 3, *[8] * dims)
    model = nn.Sequential(conv, pool, nn.ReLU(), nn.Flatten()).eval()
    path = tmp_path / "model.onnx"
    with warnings.catch_warnings(action="ignore"):
        torch.onnx.export(
            model, (x,), path, dynamo=False, input_names=["input"], dynamic_axes={"input": {0: "b"}}
        )
    read = from_file(path)
    (wanted,) = ort.InferenceSession(path).run(None, {"input": x.numpy()})
    with torch.no_grad():
        assert np.allclose(read(x).numpy(), wanted, atol=1e-5)


def test_more_candidates_than_floats_can_say() -> None:
    space = Space([ordinal(f"width:{i}", *range(1, 9)) for i in range(345)])
    job = SimpleNamespace(
        family=SimpleNamespace(space=space),
        calibrated=SimpleNamespace(samples=200),
        options=345 * 7,
    )
    assert solving.chosen(job, "auto")[0] == "allocate"


def test_a_second_metric_that_is_no_number_is_left_out_of_the_card(tmp_path: Path) -> None:
    class Unsure(Distances):
        metrics = (*Distances.metrics, esp.Metric("spread", goal="min", how="measured"))

        def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
            return {**super().measure(outputs, targets), "spread": float("nan")}

    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 1))
    found = tiny(tmp_path / "run", model, own(Unsure), repair=False, baselines=False)
    assert found.publish().exists()
    card = json.loads(Path(found.to_json()["files"]["card"]).read_text())
    assert "mae" in card["metrics"]
    assert "spread" not in card["metrics"]


def test_a_file_of_other_things_is_no_weights(tmp_path: Path) -> None:
    torch.save({1: torch.zeros(2), "a": torch.zeros(1)}, tmp_path / "numbers.pt")
    with pytest.raises(DataError, match="holds no state dict"):
        load_weights(trained(), tmp_path / "numbers.pt")


def test_a_file_that_can_not_be_timed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = {"latency_ms": 1e6, "bytes": "60%"}
    found = tiny(tmp_path / "run", within=limits, repair=False, baselines=False)

    def gone(path: Path) -> float:
        raise DataError("the device is gone")

    monkeypatch.setattr(found._job, "file_latency", gone)
    assert found.publish().exists()
    assert found.to_json()["notes"][-1] == "best.onnx, timed as written: the device is gone"


def test_a_model_that_gives_one_number_for_all_is_refused() -> None:
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean()

    with pytest.raises(EspalierError, match="width 1, the task digits needs 10"):
        given_model(Mean(), task(), None, None)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_on_a_gpu_is_read_there() -> None:
    model = trained().cuda()
    module, example = given_model(model, task(), None, None)
    assert next(module.parameters()).is_cuda
    assert not example.is_cuda


def test_a_task_of_the_users_own_file_may_have_defaults(tmp_path: Path) -> None:
    path = tmp_path / "tasks.py"
    path.write_text(
        "import espalier as esp\n"
        "def make_task(size=100):\n"
        "    return esp.tasks.images('digits', train=size, validation=50, test=50)\n"
        "def needs(size): ...\n"
        "class Task(esp.tasks.TensorTask): ...\n"
    )
    made = loaded_task(f"{path}:make_task")
    assert made.size("train") == 100
    assert made.text == f"{path}:make_task"
    assert loaded_task("digits") == "digits"
    for name, kind in (("needs", "function"), ("Task", "ABCMeta")):
        with pytest.raises(EspalierError, match=f"must give a task, got {kind}"):
            loaded_task(f"{path}:{name}")


def test_what_is_printed_is_strict_json(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"harm": float("inf"), "rows": [float("nan"), 1.5]})
    assert capsys.readouterr().out == '{"harm": null, "rows": [null, 1.5]}\n'
