"""The main job, end to end on real (embedded) data, at the smallest scale."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

import espalier as esp
from espalier.errors import BudgetError, EspalierError, StudyError
from espalier.flows.plan import Plan, make_plan
from espalier.flows.progress import Silent
from espalier.flows.ranking import ranking
from espalier.problem import SearchBudget
from espalier.report import words
from espalier.report.reading import Result
from quick import QUICK
from report_sample import sample_result

pytestmark = pytest.mark.usefixtures("tables_once")

TINY = Plan(supernet_epochs=2, trials=16, population=8, finalists=1, final_epochs=3)
SHORT = Plan(supernet_epochs=2, trials=4, population=4, finalists=1, final_epochs=1)
RECIPE = esp.Recipe(batch=64)
WITHIN = {"params": "30k", "macs": "<= 1M"}


def tiny_search(out: Path, **changes: Any) -> esp.Found:
    settings: dict[str, Any] = {
        "within": WITHIN,
        "plan": TINY,
        "recipe": RECIPE,
        "budget": "16 trials",
        "seed": 3,
        "out": out,
        "on": QUICK,
    }
    return esp.search(small_family, "digits", **{**settings, **changes})


def small_family(shape: tuple[int, ...], classes: int) -> esp.Family:
    """A MobileNet with few options: its latency table takes a second or two."""
    return esp.nets.MobileNet(
        shape, classes, 8, stem=8, widths=((8, 16), (16, 24), (32, 48)), depth=(1, 2),
        kernel=3, expansion=(2, 3), head=64,
    )  # fmt: skip


@pytest.fixture(scope="module")
def found(tables_once: None, tmp_path_factory: pytest.TempPathFactory) -> esp.Found:
    made = tiny_search(tmp_path_factory.mktemp("search") / "run")
    made.publish()
    return made


def signature(found: esp.Found) -> list[Any]:
    """What must be the same whatever was interrupted: candidates and their trained accuracy."""
    rows = [found.best, *found.front, *found.baselines]
    return [(e.name, e.candidate, e.start, e.metrics["accuracy"].value) for e in rows]


def test_the_best_keeps_every_limit(found: esp.Found) -> None:
    metrics = found.best.metrics
    assert metrics["params"].value <= 30_000
    assert metrics["macs"].value <= 1_000_000
    assert metrics["latency_ms"].how == "measured"
    assert metrics["accuracy"].split == "test"
    assert metrics["accuracy_validation"].split == "validation"
    assert metrics["accuracy"].value > 0.3  # ten classes, a network that learned something


def test_the_result_has_what_scripts_read(found: esp.Found) -> None:
    result = json.loads(json.dumps(found.to_json()))
    assert {"best", "front", "baselines", "budget", "seconds", "files"} <= set(result)
    for entry in [result["best"], *result["front"], *result["baselines"]]:
        assert entry["candidate"]
        for reading in entry["metrics"].values():
            assert {"value", "unit", "how", "split"} <= set(reading)
    assert {e["name"] for e in result["baselines"]} == {"scaled by hand", "random search"}
    assert sum(t["phase"] == "search" for t in result["trials"]) == TINY.trials
    assert sum(t["phase"] == "random" for t in result["trials"]) == TINY.trials
    assert result["network"]
    assert sum(row["params"] for row in result["network"]) == found.best.metrics["params"].value


def test_how_shared_weights_ranked_the_finalists_is_said(found: esp.Found) -> None:
    assert found.to_json()["ranking"] == {}  # of two finalists nothing can be said
    job = SimpleNamespace(
        shared=True, quality=SimpleNamespace(name="accuracy"), seed=0, estimates={}
    )
    trials = []
    for i, (guess, truth) in enumerate([(0.1, 0.5), (0.2, 0.7), (0.3, 0.6), (0.4, 0.8)]):
        candidate = esp.space.Candidate({"width": i})
        job.estimates[candidate] = SimpleNamespace(value=guess)
        reading = {"accuracy_validation": SimpleNamespace(value=truth)}
        trials.append(SimpleNamespace(state="done", candidate=candidate, metrics=reading))
    job.study = SimpleNamespace(trials=lambda phase: trials if "scratch" in phase else [])
    told = ranking(job)  # type: ignore[arg-type]
    assert (told["n"], told["kendall"]) == (
        4,
        pytest.approx(2 / 3),
    )  # five pairs agree, one does not
    sentence = words.trusted(Result(sample_result() | {"ranking": told}))[0]
    assert "the 4 finalists" in sentence
    assert "tau 0.67" in sentence
    job.shared = False
    assert ranking(job) == {}  # type: ignore[arg-type]


def test_the_network_and_its_export_compute_the_same(found: esp.Found) -> None:
    network = found.network()
    task = esp.tasks.make("digits")
    images, _ = next(iter(task.batches("test", 32)))
    session = onnxruntime.InferenceSession(found.to_json()["files"]["onnx"])
    name = session.get_inputs()[0].name
    with torch.no_grad():
        expected = network(images).numpy()
    got = np.concatenate([session.run(None, {name: x[None].numpy()})[0] for x in images])
    np.testing.assert_allclose(got, expected, atol=1e-4)
    card = json.loads(Path(found.to_json()["files"]["card"]).read_text())
    assert card["normalisation"] == task.normalisation  # how to prepare pixels, without Espalier
    assert card["candidate"] == found.best.candidate.to_json()
    modules = {type(m).__module__.split(".")[0] for m in network.modules()}
    assert "espalier" not in modules


def test_the_report_stands_beside_the_study(found: esp.Found) -> None:
    page = (found.folder / "report.html").read_text()
    assert found.to_json()["title"] in page
    assert "scaled by hand" in page
    assert (
        json.loads((found.folder / "result.json").read_text())["best"]["id"]
        == found.best.candidate.id
    )


def test_resuming_a_finished_search_measures_and_trains_nothing(found: esp.Found) -> None:
    before = {p: p.stat().st_mtime_ns for p in (found.folder / "weights").iterdir()}
    again = tiny_search(found.folder, resume=True)
    assert signature(again) == signature(found)
    assert again.best.metrics["latency_ms"] == found.best.metrics["latency_ms"]
    assert {p: p.stat().st_mtime_ns for p in (found.folder / "weights").iterdir()} == before


class Interrupting(Silent):
    """Presses Ctrl-C once, at the n-th step of a phase whose name begins with `phase`."""

    def __init__(self, phase: str, at: int) -> None:
        self.wanted, self.at, self.now = phase, at, ""

    def phase(self, name: str, total: int) -> None:
        self.now = name

    def step(self, done: int, total: int, text: str = "") -> None:
        if self.now.startswith(self.wanted) and done >= self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("phase", "at"),
    [("training the supernet", 1), ("search", 5), ("training to the end", 1)],
)
def test_an_interrupted_search_goes_on_to_the_same_result(
    found: esp.Found, tmp_path: Path, phase: str, at: int
) -> None:
    out = tmp_path / "run"
    paid = None if phase == "training the supernet" else found.folder
    with pytest.raises(KeyboardInterrupt):
        tiny_search(out, progress=Interrupting(phase, at), reuse=paid)
    assert signature(tiny_search(out, resume=True)) == signature(found)


def test_two_workers_give_the_same_result(found: esp.Found, tmp_path: Path) -> None:
    """They go on with what one process began, amid random search, and train to the end."""
    # the supernet is taken over: it was trained in this process, with this process's threads
    with pytest.raises(KeyboardInterrupt):
        tiny_search(tmp_path / "run", progress=Interrupting("random", 9), reuse=found.folder)
    assert signature(tiny_search(tmp_path / "run", resume=True, workers=2)) == signature(found)


def test_a_study_is_not_overwritten_and_not_mixed_up(found: esp.Found) -> None:
    with pytest.raises(StudyError, match="resume"):
        tiny_search(found.folder)
    with pytest.raises(StudyError, match="give it as out"):
        esp.search(small_family, "digits", within=WITHIN, plan=TINY, resume=True)
    with pytest.raises(StudyError, match="seed"):
        tiny_search(found.folder, resume=True, seed=4)
    with pytest.raises(StudyError, match="limits"):
        tiny_search(found.folder, resume=True, within={"params": "20k"})
    with pytest.raises(StudyError, match="limits"):
        tiny_search(found.folder, resume=True, within={**WITHIN, "macs": "<= 1000001"})
    with pytest.raises(StudyError, match="data"):
        esp.search(
            small_family,
            esp.tasks.images("digits", seed=9),
            within=WITHIN,
            plan=TINY,
            recipe=RECIPE,
            seed=3,
            out=found.folder,
            on=QUICK,
            resume=True,
        )


def test_an_infeasible_budget_says_what_is_reachable(tmp_path: Path) -> None:
    with pytest.raises(
        BudgetError, match=r"params <= 10 .*smallest reachable is [\d,.e+]+"
    ) as caught:
        tiny_search(tmp_path / "a", within={"params": 10, "macs": "1G"})
    assert "macs" not in str(caught.value)  # only what binds is named
    assert not (tmp_path / "a" / "ledger.sqlite").exists()
    with pytest.raises(BudgetError, match="latency_ms <= 1e-06"):
        tiny_search(tmp_path / "b", within={"latency_ms": 1e-6})
    assert not (tmp_path / "b" / "ledger.sqlite").exists()  # the folder is free for a mended limit


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"within": {"latencyms": 1}}, "latency_ms"),
        ({"within": {"params": "60q"}}, "60q|unit"),
        ({"within": {"accuracy": ">= 0.9"}}, "costs"),
        ({"strategy": "nsga"}, "nsga2"),
        ({"budget": "soon"}, "2min"),
    ],
)
def test_bad_input_gets_one_line_with_the_nearest(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(EspalierError, match=words) as caught:
        tiny_search(tmp_path / "run", **changes)
    assert "\n" not in str(caught.value)


def test_unknown_family_and_task_name_the_nearest() -> None:
    with pytest.raises(EspalierError, match="mobilenet"):
        esp.search("mobilnet", "digits")
    with pytest.raises(EspalierError, match="digits"):
        esp.search("mobilenet", "digit")


class Perceptron(esp.Family):
    """A declared family without shared weights: width and depth of a perceptron."""

    name = "perceptron"

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        self.shape, self.classes = shape, classes

    @property
    def space(self) -> esp.Space:
        return esp.Space([esp.ordinal("width", 8, 16, 32), esp.integer("depth", 1, 2)])

    def build(self, candidate: esp.Candidate) -> torch.nn.Module:
        width = int(candidate["width"])
        sizes = [int(np.prod(self.shape)), *[width] * int(candidate["depth"])]
        layers: list[torch.nn.Module] = [torch.nn.Flatten()]
        for i, o in itertools.pairwise(sizes):
            layers += [torch.nn.Linear(i, o), torch.nn.ReLU()]
        return torch.nn.Sequential(*layers, torch.nn.Linear(sizes[-1], self.classes))


def test_an_own_family_own_cost_and_no_shared_weights(tmp_path: Path) -> None:
    class Silicon(esp.Cost):
        metrics = (esp.Metric("silicon", "mm2", "min", "predicted"),)

        def estimate(self, candidates: Any) -> esp.Metrics:
            area = [0.01 * int(c["width"]) * int(c["depth"]) for c in candidates]
            return esp.Metrics({"silicon": area}, self.metrics)

    found = esp.search(
        Perceptron,
        "digits",
        within={"silicon": 0.4},
        costs=[Silicon()],
        plan=Plan(0, 4, 4, 1, 2),
        recipe=RECIPE,
        out=tmp_path / "run",
        on=QUICK,
    )
    assert found.best.metrics["silicon"].value <= 0.4
    assert found.best.start == "scratch"


def test_an_own_strategy_is_made_from_space_and_seed(found: esp.Found, tmp_path: Path) -> None:
    class Backwards(esp.strategies.Random):
        """Random search under another name."""

        name = "backwards"

    own = tiny_search(tmp_path / "run", strategy=Backwards, reuse=found.folder, plan=SHORT)
    with esp.Study.open(own.folder) as study:
        assert study.meta["phase/search"]["strategy"] == "backwards"
    with pytest.raises(StudyError, match="strategy"):
        tiny_search(tmp_path / "run", resume=True, plan=SHORT)


def test_a_limit_so_tight_that_random_search_finds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("espalier.study.search.IDLE_ASKS", 20)  # one candidate keeps it
    family = esp.nets.make("resnet", (1, 8, 8), 10)
    counts = esp.costs.Counts(family)
    least = float(counts.estimate_codes(family.space.corner(last=False))["params"][0])
    found = esp.search(
        family, "digits", within={"params": least}, plan=SHORT, recipe=RECIPE, out=tmp_path / "run",
        on=QUICK,
    )  # fmt: skip
    result = found.to_json()
    assert found.best.metrics["params"].value == least
    assert not [e for e in found.baselines if e.name == "random search"]
    assert any("Random search found nothing" in text for text in result["verdicts"])
    assert found.report().exists()  # it copes with a missing baseline


@pytest.mark.parametrize("slow_calibrations", [1, 2])
def test_a_limit_out_of_reach_is_refused_after_a_second_calibration_only(
    slow_calibrations: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the machine is slow every network seems to cost nearly as much as the largest."""
    calibrate, made = esp.costs.PredictedLatency.calibrate, list[dict[str, Any]]()

    def sometimes_slow(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        made.append(made[0] if made else calibrate(self, *args, **kwargs))
        slow = 1000.0 if len(made) <= slow_calibrations else 0.0
        return {**made[0], "overhead_ms": made[0]["overhead_ms"] + slow}

    monkeypatch.setattr(esp.costs.PredictedLatency, "calibrate", sometimes_slow)
    # far above what these networks take, on however busy a machine, and far below the slow overhead
    search = {"within": {"latency_ms": 50.0}, "out": tmp_path / "run", "plan": SHORT}
    if slow_calibrations == 1:
        assert tiny_search(**search).best.metrics["latency_ms"].value < 100
    else:
        with pytest.raises(BudgetError, match="smallest reachable"):
            tiny_search(**search)
    assert len(made) == 2


def test_another_familys_study_is_not_reused(found: esp.Found, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="reuse"):
        esp.search("resnet", "digits", reuse=found.folder, out=tmp_path / "run")


def test_a_family_of_another_shape_is_refused() -> None:
    family = esp.nets.make("mobilenet", (3, 32, 32), 10)
    with pytest.raises(EspalierError, match="shape"):
        esp.search(family, "digits")


def test_the_plan_spends_the_time_it_is_given() -> None:
    speed = {"supernet_epoch": 1.0, "trial": 0.02, "final_epoch": 0.2}
    short = make_plan(SearchBudget.parse("60s"), 10, speed, 2, True)
    long = make_plan(SearchBudget.parse("10min"), 10, speed, 2, True)
    assert long.supernet_epochs > short.supernet_epochs
    assert long.trials > short.trials
    for plan, seconds in ((short, 60), (long, 600)):
        rounds = 2 * (2 * plan.finalists + 2) / 2
        planned = (
            plan.supernet_epochs + 2 * plan.trials * 0.02 / 2 + rounds * plan.final_epochs * 0.2
        )
        assert planned <= seconds
    assert make_plan(SearchBudget.parse("40 trials"), 0, {}, 1, True).trials == 40
