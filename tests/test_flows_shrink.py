"""A trained model and a budget: end to end on embedded digits, at the smallest scale."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import espalier as esp
from espalier.compress.sparsity import stored_bytes
from espalier.compress.widths import Widths
from espalier.costs.side_by_side import Ratio, ratio
from espalier.errors import BudgetError, DataError, EspalierError, StudyError
from espalier.flows import fitting, gating, repairing, solving
from espalier.flows.finals import Entry
from espalier.flows.importances import importances
from espalier.flows.progress import Silent
from espalier.flows.rivals import rivals
from espalier.flows.shrink_identity import settings_of
from espalier.flows.shrinking import LATENCY, Shrinking
from espalier.flows.shrunk import best_first
from espalier.flows.shrunk_result import _decided_by
from espalier.flows.solving import chosen, known_names
from espalier.problem import Limit, Reading, SearchBudget
from espalier.solvers.allocate import Factor
from espalier.study import Study
from quick import QUICK
from shrink_toys import Small, task, trained

pytestmark = pytest.mark.usefixtures("quick_tables")

pytest.importorskip("ortools")

WITHIN = {"bytes": "60%", "macs": "<= 50%"}
CUTS = (esp.compress.Widths(multiple=2, steps=4), esp.compress.Depth())


def tiny_shrink(out: Path, **changes: Any) -> esp.Shrunk:
    settings: dict[str, Any] = {
        "within": WITHIN,
        "decisions": CUTS,
        "solver": "allocate",
        "recipe": esp.Recipe(epochs=1, lr=0.02),
        "budget": "10 trials",  # no limit on time: the recipe decides, so that runs are the same
        "on": QUICK,
        "seed": 3,
        "out": out,
    }
    return esp.shrink(trained(), task(), **{**settings, **changes})


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> esp.Shrunk:
    made = tiny_shrink(tmp_path_factory.mktemp("shrink") / "run")
    made.report()
    return made


def entries_of(found: esp.Shrunk) -> dict[str, Entry]:
    """All by name; the solver's answer is "shrunk" where a baseline has beaten it on validation too."""
    rows = {e.name: e for e in (found.best, *found.baselines)}
    return {"shrunk" if n == "the answer of allocate" else n: e for n, e in rows.items()}


def signature(found: esp.Shrunk) -> list[Any]:
    rows = [found.best, *found.baselines]
    return [(e.name, e.candidate, e.metrics["accuracy"].value) for e in rows]


def weight_bytes(model: nn.Module) -> int:
    """Counted by hand: what the state dict holds."""
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())


def test_the_answer_keeps_every_limit_as_counted_by_hand(found: esp.Shrunk) -> None:
    assert weight_bytes(found.network()) <= 0.6 * weight_bytes(trained())
    assert found.best.metrics["bytes"].value == weight_bytes(found.network())
    assert found.best.metrics["macs"].value <= 0.5 * found.original.metrics["macs"].value
    assert found.best.metrics["latency_ms"].how == "measured"


def test_the_original_is_left_as_it_was_and_tested(found: esp.Shrunk) -> None:
    again = esp.train.evaluate(trained(), task(), "test")
    assert found.original.metrics["accuracy"].value == again["accuracy"]
    assert found.original.metrics["bytes"].value == weight_bytes(trained())
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(found.network(found.original)(x), trained()(x))


def test_no_candidate_within_the_limits_has_less_harm(found: esp.Shrunk) -> None:
    """The whole space against the program, from the numbers of the report alone."""
    rows = found.to_json()["shrink"]["sensitivity"]
    harm = {(r["decision"], r["option"]): r["harm"] for r in rows}
    space = found.family.space
    candidates = space.decode(space.enumerate())
    prices = found.pricing(space.encode(candidates))
    limits = {x["metric"]: x["bound"] for x in found.to_json()["question"]["limits"]}
    kept = np.all([prices[m] <= bound for m, bound in limits.items()], axis=0)
    sums = np.array([sum(harm[name, c[name]] for name in c) for c in candidates])
    answer = entries_of(found)["shrunk"].candidate
    ours = sum(harm[name, answer[name]] for name in answer)
    assert 1 < kept.sum() < len(kept)
    assert ours == pytest.approx(sums[kept].min(), abs=1e-6)


def test_harm_is_what_calibration_says(found: esp.Shrunk) -> None:
    check_worst(found, "divergence")


def check_worst(found: esp.Shrunk, measure: Any) -> None:
    """What was told of the option that harms most is what the estimator says of it."""
    rows = found.to_json()["shrink"]["sensitivity"]
    judge = esp.estimators.Calibrated(found.family, task(), measure=measure, images=256, seed=3)
    original = found.original.candidate
    worst = max(rows, key=lambda r: r["harm"])
    changed = found.family.space.candidate({**original, worst["decision"]: worst["option"]})
    expected = judge.harm([changed])[0] - judge.harm([original])[0]
    assert worst["harm"] == pytest.approx(expected, rel=1e-4)


def test_repair_does_not_lose_what_it_had(found: esp.Shrunk) -> None:
    for row in found.to_json()["shrink"]["repair"]:
        kept = [s["quality"] for s in row["stages"] if s["kept"]]
        assert kept == sorted(kept)
        assert [s["stage"] for s in row["stages"]] == ["cut", "least squares", "fine-tuned"]
    after = esp.train.evaluate(found.network(), task(), "validation")["accuracy"]
    assert found.best.metrics["accuracy_validation"].value == after
    before = esp.train.evaluate(found.family.build(found.best.candidate), task(), "validation")
    assert found.best.metrics["accuracy_before"].value == before["accuracy"] <= after
    assert after > 0.5  # ten classes


def test_the_budget_is_told_layer_by_layer(found: esp.Shrunk) -> None:
    rows = found.to_json()["shrink"]["spent"]
    for metric in ("bytes", "macs"):
        mine = [r for r in rows if r["metric"] == metric]
        assert sum(r["original"] for r in mine) == found.original.metrics[metric].value
        assert sum(r["spent"] for r in mine) == found.best.metrics[metric].value


def test_baselines_keep_the_same_limits_and_had_the_same_repair(found: esp.Shrunk) -> None:
    entries = entries_of(found)
    assert set(entries) == {"shrunk", "uniform width", "global threshold", "random"}
    for entry in entries.values():
        assert weight_bytes(found.network(entry)) <= 0.6 * weight_bytes(trained())
    even = entries["uniform width"]
    shares = [
        even.candidate[d.name] / d.options[-1]
        for d in found.family.space.decisions
        if d.name.startswith("width:")
    ]
    assert max(shares) - min(shares) <= 0.3
    assert all(v == 1 for k, v in even.candidate.items() if k.startswith("depth:"))


def test_the_threshold_on_importance_is_one_for_all_groups(found: esp.Shrunk) -> None:
    """From importances read anew: no channel that went is far above one that stayed elsewhere."""
    entry = entries_of(found)["global threshold"]
    read = importances(found.family, CUTS, task(), 3)
    went, stayed, between = [], [], 0
    for name, score in read.items():
        options = found.family.space[f"width:{name}"].options
        kept = entry.candidate[f"width:{name}"]
        ordered = (score / score.mean()).sort(descending=True).values.tolist()
        assert kept in options
        between += options[0] < kept < options[-1]
        step = 1  # each width is the option nearest to the threshold: half of 2 channels
        if kept > options[0]:
            stayed.append(ordered[kept - 1 - step])
        if kept < options[-1]:
            went.append(ordered[kept + step])
    assert between >= 1
    assert max(went) <= min(stayed)
    assert all(v == 1 for k, v in entry.candidate.items() if k.startswith("depth:"))
    assert entry.candidate != entries_of(found)["uniform width"].candidate


@pytest.mark.parametrize(("seconds", "tuned"), [(None, "abcd"), (4.0, "acd")])
def test_a_limit_on_time_is_shared_by_three(
    seconds: float | None, tuned: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worst baseline after least squares is not fine-tuned; all that are have the same time."""
    quality, spent = {"a": 0.1, "b": 0.2, "c": 0.9, "d": 0.5}, dict[str, float | None]()

    class Fake(repairing._Repair):
        def __init__(
            self, job: Any, name: str, candidate: Any, seconds: float | None, start: str
        ) -> None:
            self.name, self.seconds, self.best, self.stages = name, seconds, nn.Identity(), []

        def closed(self) -> float:
            return quality[self.name]

        def run(self, tuned: bool) -> None:
            if tuned:
                spent[self.name] = self.seconds

    monkeypatch.setattr(repairing, "_Repair", Fake)
    monkeypatch.setattr(repairing, "save_weights", lambda network, path: None)
    monkeypatch.setattr(repairing, "weights_path", lambda *args: Path("absent"))
    monkeypatch.setattr(repairing, "entry_of", lambda job, c, start: Entry(c, "", {}))
    study = SimpleNamespace(once=lambda key, compute: compute(), folder=Path())
    job: Any = SimpleNamespace(
        study=study,
        trains=True,
        untuned=[],
        resting={},
        reading=lambda networks, closed: 0.0,
        last_seconds=8.0,
        task=SimpleNamespace(size=lambda split: 100),
        left=lambda: None if seconds is None else 8.0 + seconds,
    )
    out = repairing.repair_all(job, {name: Number(id=name) for name in "abcd"})
    assert "".join(spent) == tuned
    assert set(spent.values()) == {None if seconds is None else seconds / 3}
    assert job.untuned == [name for name in "abcd" if name not in tuned]
    assert "".join(out) == "abcd"


@pytest.mark.parametrize(("left", "had"), [(2.0, 5.0), (16.0, 8.0), (1000.0, 992.0)])
def test_a_second_answer_has_the_time_that_is_left_or_a_quarter_of_the_first(
    left: float, had: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    spent: list[float] = []
    monkeypatch.setattr(
        repairing, "_Repair", lambda job, name, c, seconds, start: spent.append(seconds)
    )
    monkeypatch.setattr(repairing, "repaired", lambda job, c, start, make, tuned: make())
    monkeypatch.setattr(repairing, "entry_of", lambda job, c, start: Entry(c, "", {}))
    known = {"repair seconds": 20.0}
    study = SimpleNamespace(
        once=lambda key, compute: known.get(key) or compute(), recorded=lambda: known
    )
    task = SimpleNamespace(size=lambda split: 100)
    job: Any = SimpleNamespace(
        study=study,
        trains=True,
        untuned=[],
        resting={},
        left=lambda: left,
        reading=lambda networks, closed: 0.0,
        last_seconds=8.0,
        task=task,
    )
    repairing.repair_all(job, {"shrunk": Number(id="a")}, again=True)
    assert spent == [had]


def test_the_network_is_plain(found: esp.Shrunk) -> None:
    modules = {type(m).__module__.split(".")[0] for m in found.network().modules()}
    assert "espalier" not in modules


def test_the_report_shows_the_shrink(found: esp.Shrunk) -> None:
    page = (found.folder / "report.html").read_text()
    for text in ("Where the budget goes", "What every option harms", "Before and after repair"):
        assert text in page
    assert "the original" in page
    saved = json.loads((found.folder / "result.json").read_text())
    assert saved["best"]["id"] == found.best.candidate.id


def test_a_finished_shrink_is_read_again(
    found: esp.Shrunk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(esp.estimators.Calibrated, "_score", None)
    monkeypatch.setattr(repairing, "_Repair", None)
    again = tiny_shrink(found.folder, resume=True)
    assert signature(again) == signature(found)


class Interrupting(Silent):
    """Presses Ctrl-C once, in a phase whose name begins with `phase`."""

    def __init__(self, phase: str) -> None:
        self.wanted, self.now = phase, ""

    def phase(self, name: str, total: int) -> None:
        self.now = name
        if name.startswith(self.wanted) and not name.startswith("what"):
            raise KeyboardInterrupt

    def step(self, done: int, total: int, text: str = "") -> None:
        if self.now.startswith(self.wanted) and done >= 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize("phase", ["what every option harms", "shrunk: fine-tuned"])
def test_an_interrupted_shrink_goes_on_to_the_same_answer(
    found: esp.Shrunk, tmp_path: Path, phase: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        tiny_shrink(tmp_path / "run", progress=Interrupting(phase))
    assert signature(tiny_shrink(tmp_path / "run", resume=True)) == signature(found)


def test_another_budget_on_the_same_profile_measures_no_harm_again(
    found: esp.Shrunk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = {"within": {"params": "40%"}, "repair": False, "baselines": False}
    monkeypatch.setattr(esp.estimators.Calibrated, "_score", None)
    reused = tiny_shrink(tmp_path / "b", reuse=found.folder, **new)
    assert sum(p.numel() for p in reused.network().parameters()) <= 0.4 * sum(
        p.numel() for p in trained().parameters()
    )
    rows, other = (f.to_json()["shrink"]["sensitivity"] for f in (found, reused))
    assert [r["harm"] for r in rows] == [r["harm"] for r in other]
    with pytest.raises(StudyError, match="seed"):
        tiny_shrink(tmp_path / "c", reuse=found.folder, seed=4)


def test_few_candidates_are_judged_whole(tmp_path: Path) -> None:
    found = tiny_shrink(
        tmp_path / "run", solver="auto", decisions=(esp.compress.Widths(multiple=4, steps=2),),
        within={"bytes": "70%"}, repair=False, baselines=False,
    )  # fmt: skip
    told = found.to_json()["shrink"]["solver"]
    assert told["name"] == "search"
    assert "candidates are few enough" in told["why"]
    assert "256 training examples are enough" in told["why"]
    space = found.family.space
    candidates = space.decode(space.enumerate())
    judge = esp.estimators.Calibrated(
        found.family, task(), measure="divergence", images=256, seed=3
    )
    bytes_ = np.array([weight_bytes(found.family.build(c)) for c in candidates])
    kept = bytes_ <= 0.7 * weight_bytes(trained())
    harm = judge.harm(candidates)
    assert found.best.candidate == candidates[int(np.flatnonzero(kept)[harm[kept].argmin()])]


@pytest.mark.parametrize(
    ("size", "images", "solver", "words"),
    [
        (64, 32, "search", "64 candidates are few enough .* 32 training examples are enough"),
        (64, 31, "allocate", "64 candidates are few, but 31 training examples too few"),
        (
            65,
            1024,
            "allocate",
            "9 options of 3 decisions .* on 1024 training examples; 65 candidates",
        ),
        (65, 8, "allocate", "on 8 training examples"),
    ],
)
def test_the_solver_is_picked_by_size_and_data(
    size: int, images: int, solver: str, words: str
) -> None:
    space = type("Space", (), {"size": size, "__len__": lambda self: 3})()
    family, calibrated = SimpleNamespace(space=space), SimpleNamespace(samples=images)
    job: Any = SimpleNamespace(family=family, calibrated=calibrated, options=9)
    name, why = chosen(job, "auto")
    assert name == solver
    assert re.search(words, why)
    assert chosen(job, "relax:pas")[0] == "relax:pas"


def test_with_few_images_options_are_judged_one_by_one(tmp_path: Path) -> None:
    few = esp.tasks.images("digits", train=20, validation=32, test=32)
    found = esp.shrink(
        trained(), few, within={"bytes": "70%"}, budget="10 trials", repair=False, baselines=False,
        decisions="width:multiple=4/steps=2", seed=3, out=tmp_path / "run",
        on=QUICK,
    )  # fmt: skip
    told = found.to_json()["shrink"]["solver"]
    assert told["name"] == "allocate"
    assert "20 training examples too few" in told["why"]


@pytest.mark.parametrize("solver", ["relax", "relax:pas", "relax:bip"])
def test_masks_that_learn_answer_within_the_limits_too(
    tmp_path: Path, solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, new = tmp_path / "run", {"solver": solver, "baselines": False, "repair": False}
    monkeypatch.setattr("espalier.flows.gating.SETTINGS", esp.relax.Settings(epochs=1))
    found = tiny_shrink(out, **new)
    assert weight_bytes(found.network()) <= 0.6 * weight_bytes(trained())
    assert found.best.metrics["macs"].value <= 0.5 * found.original.metrics["macs"].value
    assert found.to_json()["shrink"]["solver"]["name"] == solver
    assert signature(tiny_shrink(out, resume=True, **new)) == signature(found)
    other = "relax:dsa" if solver != "relax" else "relax:bip"
    with pytest.raises(StudyError, match="solver"):
        tiny_shrink(out, resume=True, **{**new, "solver": other})
    for kinds in ("width,bits", "width,sparsity"):
        with pytest.raises(EspalierError, match=rf"not {kinds[6:]}: leave that out"):
            tiny_shrink(tmp_path / kinds, **{**new, "decisions": kinds})
    with pytest.raises(EspalierError, match="add 'width'"):
        tiny_shrink(tmp_path / "b", decisions="depth", within={"macs": "70%"}, **new)
    assert not (tmp_path / "b").exists()  # nothing was measured for it


@pytest.mark.parametrize("solver", ["relax:dsa", "relax:pas", "relax:bip"])
def test_what_masks_learned_is_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, solver: str
) -> None:
    def learned(family: Any, *args: Any, **more: Any) -> Any:
        names = [n for n in family.space.names if n.startswith("width:")]
        least = {n: family.space[n].options[0 if i == 0 else -1] for i, n in enumerate(names)}
        candidate = family.space.candidate({**family.original, **least})
        scores = {n: torch.arange(float(family.space[n].options[-1])) for n in names}
        return SimpleNamespace(candidate=candidate, scores=scores)

    name = known_names(solver, "loss")
    monkeypatch.setitem(gating.METHODS, name, gating.Method(learned, 1.0))
    new = {"solver": solver, "baselines": False, "repair": False, "within": {"bytes": "99%"}}
    found = tiny_shrink(tmp_path / "run", **new)
    space = found.family.space
    first, *others = [n for n in space.names if n.startswith("width:")]
    assert found.best.candidate[first] == space[first].options[0]
    assert all(found.best.candidate[n] == space[n].options[-1] for n in others)
    assert tiny_shrink(tmp_path / "run", **{**new, "solver": name}, resume=True)


def test_bytes_of_zeros_are_saved_where_they_are_limited(tmp_path: Path) -> None:
    new = {"repair": True, "baselines": False, "decisions": "width,sparsity"}
    found = tiny_shrink(tmp_path / "run", within={"stored_bytes": "60%"}, **new)
    network = found.network()
    layers = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    saved = sum(4 * m.weight.numel() - stored_bytes(m.weight) for m in layers)
    whole = found.original.metrics["stored_bytes"].value
    assert weight_bytes(network) - saved <= 0.6 * whole
    assert found.best.metrics["stored_bytes"].value == weight_bytes(network) - saved
    assert any(k.startswith("sparsity:") and v != 1.0 for k, v in found.best.candidate.items())


def test_integers_stay_integers_through_repair_and_export(tmp_path: Path) -> None:
    found = tiny_shrink(
        tmp_path / "run", decisions="bits", within={"bytes": "32%"}, baselines=False
    )
    assert set(found.best.candidate.values()) == {8}
    found.publish()
    session = ort.InferenceSession(found.to_json()["files"]["onnx"])
    right = total = 0
    for x, y in task().batches("test", 64):
        logits = session.run(None, {session.get_inputs()[0].name: x.contiguous().numpy()})[0]
        right, total = right + int((logits.argmax(1) == y.numpy()).sum()), total + len(y)
    assert right / total == pytest.approx(found.best.metrics["accuracy"].value, abs=0.02)
    assert right / total > found.original.metrics["accuracy"].value - 0.1
    kinds = {n.op_type for n in onnx.load(found.to_json()["files"]["onnx"]).graph.node}
    assert "QuantizeLinear" in kinds


@pytest.mark.parametrize("measure", ["loss", "gradient"])
def test_other_measures_of_harm_lead_to_answers_too(tmp_path: Path, measure: str) -> None:
    new = {"solver": "auto", "repair": False, "baselines": False, "measure": measure}
    found = tiny_shrink(tmp_path / "run", **new)
    assert found.to_json()["shrink"]["solver"]["name"] == "allocate"  # too many to judge each
    assert weight_bytes(found.network()) <= 0.6 * weight_bytes(trained())
    assert found.to_json()["shrink"]["measure"] == measure
    check_worst(found, measure)


def test_what_is_printed_runs_the_same_again(found: esp.Shrunk, tmp_path: Path) -> None:
    told = found.to_json()["reproduce"]
    again = {"esp": esp, "model": trained(), **vars(esp)}
    run = told["python"].replace(repr(task().name), "task", 1)
    run = run[:-1] + ", recipe=recipe, out=out)"
    again |= {"task": task(), "recipe": esp.Recipe(epochs=1, lr=0.02), "out": tmp_path / "run"}
    assert signature(eval(run, again)) == signature(found)
    assert "--max bytes=60%" in told["command"]
    assert "--solver allocate" in told["command"]
    assert "--decisions width:multiple=2/steps=4,depth --budget" in told["command"]
    assert "only Python can say" not in told["command"]


TIMED = {
    "on": QUICK,
    "decisions": (esp.compress.Widths(multiple=8, steps=2), esp.compress.Depth()),
    "repair": False,
    "baselines": False,
}


@pytest.fixture(scope="module")
def timed(tmp_path_factory: pytest.TempPathFactory) -> esp.Shrunk:
    # a disturbed timing can put a limit out of reach, which is then refused as it must be
    out, within = tmp_path_factory.mktemp("timed"), {LATENCY: "90%", "bytes": "90%"}
    for attempt in range(3):
        with suppress(BudgetError):
            return tiny_shrink(out / str(attempt), within=within, **TIMED)
    return tiny_shrink(out / "last", within=within, **TIMED)


def test_latency_is_kept_as_measured(timed: esp.Shrunk) -> None:
    limit = timed.to_json()["question"]["limits"][0]
    assert limit["bound"] == pytest.approx(0.9 * timed.original.metrics[LATENCY].value)
    assert timed.best.metrics[LATENCY].value <= limit["bound"]
    assert timed.best.metrics[LATENCY].how == "measured"
    assert timed.to_json()["shrink"]["rounds"]
    assert any("in turns" in note for note in timed.to_json()["notes"])
    with Study.open(timed.folder) as study:
        read = study.recorded()[f"latency-trained/{timed.best.candidate.id}"]
    assert read["share"] * timed.original.metrics[LATENCY].value == pytest.approx(read["value"])
    assert {r["metric"] for r in timed.to_json()["shrink"]["spent"]} == {LATENCY, "bytes"}


def test_the_file_that_is_handed_out_is_timed(
    timed: esp.Shrunk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was measured before is a trace; the file comes from another exporter."""
    limit = timed.to_json()["question"]["limits"][0]["bound"]
    shares = iter([5.0, 1.0, 0.8, 0.5, 5.0, 4.0, 0.1])  # with 0.9 as the limit
    seen: list[Any] = []

    def told(runtime: Any, model: Any, reference: bytes, example: Any) -> Ratio:
        seen.append(model)
        return Ratio(next(shares), 0.0, 3)

    monkeypatch.setattr("espalier.flows.shrinking.ratio", told)
    exported = timed.export()
    monkeypatch.setattr(esp.Shrunk, "export", lambda self: exported)
    words = []
    for _ in range(3):
        timed.publish()
        words.append(timed.to_json()["notes"][-1])
    original = timed.original.metrics[LATENCY].value
    assert words == [
        f"best.onnx, timed as written: {share * original:.4g} ms, {word} the limit of {limit:.4g} ms."
        for share, word in ((1.0, "over"), (0.5, "within"), (4.0, "over"))
    ]
    assert set(seen) == {Path(timed.to_json()["files"]["onnx"])}
    monkeypatch.undo()
    timed.publish()
    assert 0.2 * original < timed.to_json()["file_latency_ms"] < 5 * original
    assert sum("timed as written" in note for note in timed.to_json()["notes"]) == 1
    assert "timed as written" in (timed.folder / "report.html").read_text()


def test_a_limit_in_milliseconds_is_kept_in_milliseconds(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="latency_ms"):
        tiny_shrink(tmp_path / "a", within={LATENCY: 1e-6}, **TIMED)
    found = tiny_shrink(tmp_path / "b", within={LATENCY: 1e3, "bytes": "90%"}, **TIMED)
    assert not any("in turns" in note for note in found.to_json()["notes"])
    with Study.open(found.folder) as study:
        assert "share" not in study.recorded()[f"latency-trained/{found.best.candidate.id}"]
    assert weight_bytes(found.network()) <= 0.9 * weight_bytes(trained())


# --- fitting to a measured limit ---------------------------------------------------------------


def fake_job(factor: float, noise: dict[int, float] | None = None) -> Any:
    """Candidates are numbers; n costs n ms by the table and `factor` n ms as measured."""
    measured = lambda c, *_: Reading((noise or {}).get(c.id, factor * c.id), "ms", "measured")  # noqa: E731
    limit = Limit(LATENCY, 50.0)
    original = SimpleNamespace(id=100)
    return SimpleNamespace(
        limits=(limit,),
        cuts=(esp.compress.Widths(),),
        latency_limit=limit,
        predicted=object(),
        price=lambda c: {LATENCY: Reading(float(c.id), "ms", "predicted")},
        measured=measured,
        original=SimpleNamespace(metrics={LATENCY: measured(original)}),
        family=SimpleNamespace(original=original, name="fake"),
        study=SimpleNamespace(once=lambda key, compute: {}),
        runtime=SimpleNamespace(name="a clock"),
        rounds=[],
        slower={},
        budget=SearchBudget(),
        trains=True,
        left=lambda: None,
        affords=lambda networks: True,
        show=Silent(),
        keeps=lambda readings: readings[LATENCY].value <= 50,
    )


class Number(SimpleNamespace):
    """A candidate that can be a key."""

    def __hash__(self) -> int:
        return hash(self.id)


def largest(limits: Any) -> Any:
    if limits[0].bound < 10:
        raise BudgetError("none")
    return Number(id=int(min(limits[0].bound, 100)))


@pytest.mark.parametrize("factor", [0.3, 0.97, 1.0, 1.4, 2.6])
def test_a_table_that_is_off_by_a_factor_is_corrected_by_measuring(factor: float) -> None:
    job = fake_job(factor)
    job.original.metrics[LATENCY] = Reading(100.0)  # so the first guess is wrong
    answer = fitting.fitted(job, "fake", largest)
    assert factor * answer.id <= 50
    if factor > 0.5:  # the original itself is over the limit
        assert factor * (answer.id + 3) > 50
    assert len(job.rounds) <= 10


def test_a_limit_that_nothing_keeps_says_what_the_smallest_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = fake_job(6.0)
    monkeypatch.setattr(fitting, "least", lambda job, metric: Number(id=10))
    with pytest.raises(
        BudgetError, match=r"smallest takes 60 ms, 20% over 50 ms and 10% of"
    ) as told:
        fitting.best_fitted(job, "fake", {"one": largest})
    assert "raise the limit or let widths go down further, with width:least=5%" in str(told.value)
    for cuts in ((esp.compress.Widths(least=0.05),), (esp.compress.Depth(),)):
        job.cuts = cuts
        with pytest.raises(BudgetError, match="or allow more decisions"):
            fitting.best_fitted(job, "fake", {"one": largest})


@pytest.mark.parametrize(("spread", "looks"), [(0.0, 1), (15.0, 3)])
def test_a_look_that_may_be_over_the_limit_is_not_taken_for_one_within(
    spread: float, looks: int
) -> None:
    job, asked = fake_job(1.0), list[str]()

    def measured(candidate: Any, network: Any, key: str) -> Reading:
        asked.append(key)
        return Reading(40.0, "ms", "measured", "", spread)

    job.measured = measured
    fitting.measured(job, Number(id=40), 50.0, patient=False)
    assert len(asked) == looks


def test_a_second_answer_begins_where_the_first_one_ended() -> None:
    job = fake_job(3.0)
    job.original.metrics[LATENCY] = Reading(50.0)  # by which the first guess is far off
    first = fitting.fitted(job, "fake", largest)
    rounds = len(job.rounds)
    second = fitting.fitted(job, "fake", largest, 0.9)
    assert 3 * first.id <= 50
    assert 0.8 * 45 < 3 * second.id <= 45
    assert len(job.rounds) == rounds + 1 < 2 * rounds


def test_one_slow_answer_does_not_end_the_rounds() -> None:
    job = fake_job(1.0, noise={49: 80.0})
    answer = fitting.fitted(job, "fake", largest)
    assert 40 <= answer.id <= 50
    assert answer.id != 49


def test_a_lucky_look_just_within_the_limit_is_looked_at_again() -> None:
    """50 ms is the limit: what seems to take 49 and takes 52 would be found out after its repair."""
    job, looks = fake_job(1.0), dict[int, int]()
    true = job.measured

    def lucky(c: Any, *rest: Any) -> Reading:
        looks[c.id] = looks.get(c.id, 0) + 1
        found: Reading = true(c, *rest)
        return found if looks[c.id] == 1 or c.id < 49 else replace(found, value=1.06 * found.value)

    job.measured = lucky
    answer = fitting.fitted(job, "fake", largest)
    assert 40 < answer.id < 49
    assert looks[49] == 3
    assert looks[answer.id] == 1  # well within


def test_where_another_limit_binds_the_bound_on_latency_is_not_raised_again_and_again() -> None:
    job, asked = fake_job(1.0), list[float]()

    def within_bytes(limits: Any) -> Any:
        asked.append(limits[0].bound)
        return Number(id=int(min(limits[0].bound, 30)))

    assert fitting.fitted(job, "fake", within_bytes).id == 30
    assert len(asked) <= 3


def test_time_to_read_splits_is_kept_free() -> None:
    sizes = {"validation": 500, "test": 1000}
    job: Any = SimpleNamespace(
        left=lambda: 208.0, validation_seconds=2.0, task=SimpleNamespace(size=sizes.get),
        budget=SearchBudget(seconds=300.0), trains=True, last_seconds=8.0,
    )  # fmt: skip
    job.reading = partial(Shrinking.reading, job)
    # the original reads test in 4 s, four networks in half of that; one is only mended: three passes of 1 s
    assert repairing._share(job, 4, 0.0) == pytest.approx((208 - 8 - 4 - 4 * 2 - 3 * 1) / 3)
    deciding = Shrinking.deciding.fget
    assert deciding(job) == pytest.approx(300 - 8 - 4 - 2 - 3)
    assert Shrinking.affords(job, 4)
    job.validation_seconds = 100.0
    assert repairing._share(job, 4, 0.0) == pytest.approx((208 * 0.4 - 8) / 3)
    assert deciding(job) == 150
    assert not Shrinking.affords(job, 1)
    # 24 s for the original, 30 s a network; a fifth of the time to train
    job.validation_seconds = 12.0
    assert [Shrinking.affords(job, n) for n in range(1, 6)] == [True, True, True, False, False]


def test_images_are_as_many_as_their_share_of_the_time_takes() -> None:
    sizes = {"validation": 100}
    job: Any = SimpleNamespace(
        validation_seconds=10.0, task=SimpleNamespace(size=sizes.get), deciding=200.0
    )
    # three passes take 0.3 s an image, of 16 s
    assert Shrinking.affordable(job, 0.08, 3.0, 512) == 53
    assert Shrinking.affordable(job, 0.08, 3.0, 40) == 40
    job.deciding = 1.0
    assert Shrinking.affordable(job, 0.08, 3.0, 512) == 16
    job.deciding = None
    assert Shrinking.affordable(job, 0.08, 3.0, 512) == 512


def test_rivals_are_not_looked_for_when_the_time_is_spent() -> None:
    job = fake_job(1.0)
    job.family.cuts, job.study.notes = (), []
    job.affords = lambda networks: False
    assert rivals(job) == {}
    assert len(job.study.notes) == 2


def test_masks_learn_within_what_the_table_says_of_the_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table has a pace of its own: half of the measured latency is half of the predicted."""
    job = fake_job(2.0)
    asked = list[Any]()

    def prune(family: Any, task: Any, limits: Any, **settings: Any) -> Any:
        asked.extend(limits)
        raise KeyboardInterrupt

    monkeypatch.setitem(gating.METHODS, "relax", gating.Method(prune, 1.0))
    job.study = SimpleNamespace(folder=tmp_path, once=lambda key, compute: compute())
    job.task, job.seed = None, 0
    with pytest.raises(KeyboardInterrupt):
        gating.relaxing(job, "relax")
    assert [x.bound for x in asked] == [25.0]


@pytest.mark.parametrize(
    ("seconds", "epochs", "images"),
    # a pass over 640 images is 10 steps and takes 1 s, masks twice as long; they have 0.3 of the time
    [(1e9, 10, 640), (40.0, 6, 640), (6.0, 1, 576), (1.0, 1, 512), (None, 10, 640)],
)
def test_masks_learn_on_a_part_of_train_where_a_pass_takes_too_long(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seconds: float | None,
    epochs: int,
    images: int,
) -> None:
    job, told = fake_job(1.0), list[Any]()

    def prune(family: Any, task: Any, limits: Any, **settings: Any) -> Any:
        told.append((settings["settings"].epochs, task.size("train")))
        raise KeyboardInterrupt

    monkeypatch.setattr(gating, "timed_second", lambda work, threads: 0.4)
    monkeypatch.setitem(gating.METHODS, "relax", gating.Method(prune, 2.0))
    job.study = SimpleNamespace(folder=tmp_path, once=lambda key, compute: compute())
    task = esp.tasks.images("digits", train=640, validation=32, test=32)
    job.task, job.seed, job.family.model = task, 0, nn.Identity()
    job.budget = SearchBudget(seconds=seconds)
    with pytest.raises(KeyboardInterrupt):
        gating.relaxing(job, "relax")
    assert told == [(epochs, images)]


def test_cuts_with_other_scores_are_other_cuts() -> None:
    ones, twos = ({"a": torch.full((4,), v)} for v in (1.0, 2.0))
    assert settings_of(Widths(scores=ones)) != settings_of(Widths(scores=twos))
    assert settings_of(Widths(scores=ones)) == settings_of(Widths(scores=dict(ones)))


def test_what_seems_harmless_is_not_cut_unless_a_limit_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "espalier.estimators.calibration.Calibrated.harm", lambda self, found: np.zeros(len(found))
    )
    new = {"repair": False, "baselines": False}
    found = tiny_shrink(tmp_path / "run", within={"params": "99.9%"}, **new)
    original = found.original.candidate
    cut = [n for n in original if found.best.candidate.get(n) != original[n]]
    assert len(cut) == 1


def test_of_several_ways_to_solve_the_best_after_the_closed_repair_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = fake_job(1.0)
    # to keep 30 would be best
    monkeypatch.setattr(fitting, "mended", lambda job, name, c: -abs(c.id - 30.0))

    def to_thirty(limits: Any) -> Any:
        return Number(id=int(min(limits[0].bound, 30)))

    def refusing(limits: Any) -> Any:
        raise BudgetError("there are no such layers")

    found = fitting.best_fitted(job, "fake", {"wide": largest, "thin": to_thirty, "too": largest})
    assert list(found) == ["fake", "wide"]  # the other one is compared once it is repaired
    assert found["fake"].id == 30
    assert found["wide"].id > 40
    assert list(fitting.best_fitted(job, "fake", {"wide": largest})) == ["fake"]
    monkeypatch.setattr(fitting, "least", lambda job, metric: Number(id=10))
    with pytest.raises(BudgetError, match="smallest takes 60 ms"):
        fitting.best_fitted(fake_job(6.0), "fake", {"one": refusing, "other": refusing})


@pytest.mark.parametrize("goal", ["max", "min"])
def test_a_baseline_that_validates_better_is_handed_out(goal: str) -> None:
    """Whatever was kept within the limits and is best: the answer only wins ties."""
    entries = {
        name: Entry(Number(id=name), name, {"q_validation": Reading(q)})
        for name, q in (("shrunk", 2.0), ("uniform width", 2.0), ("random", 3.0))
    }
    job: Any = SimpleNamespace(quality=SimpleNamespace(name="q", goal=goal))
    names = [e.name for e in best_first(job, entries, "allocate")]
    if goal == "min":
        assert names == ["shrunk", "uniform width", "random"]
    else:
        assert names == ["random", "the answer of allocate", "uniform width"]


def test_the_result_says_who_decided() -> None:
    def told(name: str, *others: str) -> dict[str, str]:
        best, *rest = (SimpleNamespace(name=n) for n in (name, *others))
        found: Any = SimpleNamespace(best=best, baselines=rest)
        return _decided_by(found, "relax", "so")

    assert told("shrunk", "random") == {"name": "relax", "why": "so"}
    better, alone = told("random", "the answer of relax"), told("random", "uniform width")
    assert better["name"] == alone["name"] == "random"
    assert better["why"].startswith("random was better on validation than the answer of relax")
    assert alone["why"].startswith("the answer of relax was over the limits")
    assert better["why"].endswith("relax was taken because so")


def test_where_least_squares_do_not_help_statistics_are_set_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(network: nn.Module, *args: Any, **settings: Any) -> dict[str, Any]:
        for weights in network.parameters():
            weights.data.zero_()
        return {"output": {}, "skipped": []}

    monkeypatch.setattr(repairing.repair, "reconstruct", spoil)
    new = {"within": {"params": "60%"}, "baselines": False, "repair": True, "tune": False}
    found = tiny_shrink(tmp_path / "run", **new)
    (row,) = found.to_json()["shrink"]["repair"]
    stages = [(s["stage"], s["kept"]) for s in row["stages"]]
    assert stages[:2] == [("cut", True), ("least squares", False)]
    assert [name for name, _ in stages[2:]] == ["statistics"]


def test_without_tuning_the_repair_ends_after_its_closed_forms(tmp_path: Path) -> None:
    new = {"within": {"params": "60%"}, "baselines": False, "repair": True, "tune": False}
    found = tiny_shrink(tmp_path / "run", **new)
    (row,) = found.to_json()["shrink"]["repair"]
    assert [s["stage"] for s in row["stages"]] == ["cut", "least squares"]
    assert "--no-tune" in found.to_json()["reproduce"]["command"]
    with pytest.raises(StudyError, match="tune"):
        tiny_shrink(tmp_path / "run", **{**new, "tune": True}, resume=True)


def test_with_bits_a_latency_is_also_kept_with_every_layer_in_integers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among float layers an integer layer is slow, all in integers they are fast: both are tried."""

    def slow_unless_all(runtime: Any, model: bytes, *rest: Any) -> Ratio:
        nodes = onnx.load_from_string(model).graph.node
        integers = {o for n in nodes if n.op_type == "DequantizeLinear" for o in n.output}
        layers = [n.input[1] in integers for n in nodes if n.op_type in ("Conv", "Gemm", "MatMul")]
        return Ratio(0.5 if all(layers) else 0.95, 0.0, 3)

    monkeypatch.setattr("espalier.flows.shrinking.ratio", slow_unless_all)
    new = {**TIMED, "decisions": (esp.compress.Bits(),)}
    found = tiny_shrink(tmp_path / "run", within={LATENCY: "60%"}, **new)
    chosen = {v for k, v in found.best.candidate.items() if k.startswith("bits:")}
    assert chosen == {8}


def test_what_answers_were_compared_by_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge, judged = repairing._Repair.judge, list[tuple[str, str]]()

    def noted(self: Any, stage: str, *rest: Any) -> None:
        judged.append((self.candidate.id, stage))
        judge(self, stage, *rest)

    monkeypatch.setattr(repairing._Repair, "judge", noted)
    monkeypatch.setattr("espalier.flows.shrinking.ratio", lambda *args: Ratio(0.55, 0.0, 3))
    cuts = (esp.compress.Widths(multiple=8, steps=2), esp.compress.Bits())
    new = {**TIMED, "decisions": cuts, "repair": True, "tune": False}
    found = tiny_shrink(tmp_path / "run", within={LATENCY: "60%"}, **new)
    with Study.open(found.folder) as study:
        compared = [k for k in study.recorded() if k.startswith("mended/")]
    assert len(compared) > 1
    assert (found.best.candidate.id, "cut") in judged
    assert len(set(judged)) == len(judged)
    assert not found._job.resting


def test_a_repair_that_rested_learns_as_long_as_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """What its closed forms took when answers were compared is part of its share, as the others' is."""
    now, left = [100.0], list[float]()
    monkeypatch.setattr(repairing, "time", SimpleNamespace(time=lambda: now[0]))
    monkeypatch.setattr(repairing, "weights_path", lambda *args: Path("absent"))
    monkeypatch.setattr(repairing, "save_weights", lambda network, path: None)
    monkeypatch.setattr(repairing, "entry_of", lambda job, c, start: Entry(c, "", {}))

    def took(self: Any, *rest: Any) -> None:
        now[0] += 5.0
        self.stages.append({"stage": "cut", "kept": True})

    def fine_tune(self: Any, network: Any) -> None:
        left.append(self.seconds - (now[0] - self.started))

    monkeypatch.setattr(repairing._Repair, "judge", took)
    monkeypatch.setattr(repairing._Repair, "statistics", lambda self, network: None)
    monkeypatch.setattr(repairing._Repair, "fine_tune", fine_tune)
    study = SimpleNamespace(once=lambda key, compute: compute(), folder=Path())
    answer, rival = Number(id="a"), Number(id="b")
    job: Any = SimpleNamespace(
        study=study, trains=True, repair=False, untuned=[], resting={},
        reading=lambda networks, closed: 0.0, last_seconds=8.0,
        task=SimpleNamespace(size=lambda split: 100), show=Silent(), left=lambda: 68.0,
        family=SimpleNamespace(build=lambda c: nn.Identity(), original=None),
    )  # fmt: skip
    repairing.mended(job, "shrunk", answer)
    repairing.repair_all(job, {"shrunk": answer, "uniform": rival})
    # 60 seconds and the 10 that were paid, in two shares, less 10 of closed forms each
    assert left == [25.0, 25.0]


def test_layers_of_one_kind_alone_are_tried_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table is off where kinds are mixed: of 4 (simulated), 8 and 32 bits, what can compute on
    integers and what is float have an answer of their own."""
    bits = esp.compress.Bits(options=(4, 8, 32))
    family = esp.compress.Pretrained(trained(), torch.zeros(2, 1, 8, 8), (bits,))
    asked: list[Any] = []
    monkeypatch.setattr(solving, "program_on", lambda job, harm, *_: asked.append(list(harm)))
    for limit, count in ((None, 1), (Limit(LATENCY, 1.0), 3)):
        job: Any = SimpleNamespace(
            family=family, latency_limit=limit, limits=(), pricing=SimpleNamespace(costs=[]),
            sense=lambda: SimpleNamespace(factors=()),
        )  # fmt: skip
        asked.clear()
        assert len(solving.allocating(job)) == count
    integers, floats, everything = asked
    assert everything == []
    names = [f.decisions for f in integers]
    assert (
        sorted(names)
        == sorted((n,) for n in family.space.names)
        == sorted(f.decisions for f in floats)
    )
    assert all((np.isinf(f.values) == [False, False, True]).all() for f in integers)
    assert all((np.isinf(f.values) == [True, True, False]).all() for f in floats)


def test_the_program_on_mixed_kinds_begins_at_the_better_of_one_kind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    family = esp.compress.Pretrained(trained(), torch.zeros(2, 1, 8, 8), CUTS)
    worse, better = family.space.decode(family.space.corner(False))[0], family.original
    hints: list[Any] = []
    solve = solving.Program.solve

    def noted(program: Any, *args: Any, hint: Any = None, **settings: Any) -> Any:
        hints.append(hint)
        return solve(program, *args, hint=hint, **settings)

    def refusing(limits: Any) -> Any:
        raise BudgetError("there are no such layers")

    monkeypatch.setattr(solving.Program, "solve", noted)
    job: Any = SimpleNamespace(
        family=family,
        limits=(),
        pricing=SimpleNamespace(costs=[]),
        budget=SearchBudget(),
        greedy={},
        seed=0,
    )
    harm = [Factor((d.name,), np.linspace(1.0, 0.0, d.count)) for d in family.space.decisions]
    begun = [refusing, lambda limits: worse, lambda limits: better]
    solving.program_on(job, harm, begun)(())
    solving.program_on(job, harm, [refusing])(())
    assert hints == [better, None]


def test_an_answer_that_is_over_the_limit_after_all_is_refused(
    timed: esp.Shrunk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that turns out slow after the repair: an error, never a model over the budget."""
    slow: list[int] = []

    def slower(*args: Any) -> Ratio:
        found = ratio(*args)
        return replace(found, value=10.0) if slow else found

    class Slowing(Silent):
        def phase(self, name: str, total: int) -> None:
            if name.startswith("shrunk: statistics"):
                slow.append(1)

    monkeypatch.setattr("espalier.flows.shrinking.ratio", slower)
    with pytest.raises(BudgetError, match=r"latency_ms|as measured"):
        tiny_shrink(
            tmp_path / "run",
            within={LATENCY: "95%", "bytes": "90%"},  # the original itself is too large
            progress=Slowing(),
            reuse=timed.folder,
            **TIMED,
        )


def test_where_the_answer_is_over_the_limit_after_all_a_baseline_within_it_is_handed_out(
    timed: esp.Shrunk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [""]

    class Following(Silent):
        def phase(self, name: str, total: int) -> None:
            now[0] = name

    def slow_once_repaired(*args: Any) -> Ratio:
        return Ratio(10.0 if now[0].startswith("shrunk: ") else 0.5, 0.0, 3)

    def least(job: Any) -> esp.Candidate:
        found: esp.Candidate = job.family.space.decode(job.family.space.corner(last=False))[0]
        return found

    monkeypatch.setattr("espalier.flows.shrinking.ratio", slow_once_repaired)
    monkeypatch.setattr("espalier.flows.shrink._TIGHTER", (1.0, 0.01))  # the second: out of reach
    # in so small a space a noisy table can lead every way to the answer's own candidate
    monkeypatch.setattr("espalier.flows.shrink.rivals", lambda job: {"uniform width": least(job)})
    found = tiny_shrink(
        tmp_path / "run",
        within={LATENCY: "95%", "bytes": "90%"},  # the original itself is too large
        progress=Following(),
        reuse=timed.folder,
        **{**TIMED, "baselines": True},
    )
    assert found.best.name == "uniform width"
    result = found.to_json()
    assert "Over the limit as measured and left out: the answer of allocate." in result["verdicts"]
    assert any("was over the limits once it was repaired" in n for n in result["notes"])


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"within": {}}, "latency_ms=60%"),
        ({"within": {"latencyms": 1}}, "latency_ms"),
        ({"within": {"accuracy": ">= 0.9"}}, "costs"),
        (
            {"within": {"bytes": "2%"}},
            "least bytes that is reachable .*; raise the limit or let widths",
        ),
        ({"decisions": "widths"}, "width"),
        ({"decisions": ""}, "kind of decision"),
        ({"solver": "alocate"}, "allocate"),
        ({"solver": "relax:bop"}, "'relax:bip'.*Known: .*relax:dsa.*relax:pas"),
        ({"measure": "los"}, "loss"),
        ({"budget": "soon"}, "2min"),
        ({"weights": "absent.safetensors"}, "absent.safetensors"),
    ],
)
def test_bad_input_gets_one_line(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(EspalierError, match=words) as caught:
        tiny_shrink(tmp_path / "run", **changes)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "ledger.sqlite").exists()  # free for the mended command


class Pair(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return x, x


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Small(7), "width 7, the task digits needs 10"),
        (Pair(), "one tensor, got tuple"),
        (nn.Sequential(nn.Linear(3, 10)), "does not run on an input"),
        (Small().half(), r"weights are float16: give model.float\(\)"),
        (lambda: 3, "must give a torch.nn.Module, got int"),
        (3, "got int"),
        ("absent.pt2", "absent.pt2"),
        ("model.bin", "pt2"),
    ],
)
def test_a_model_that_does_not_fit_gets_one_line(model: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(EspalierError, match=words) as caught:
        esp.shrink(model, task(), within=WITHIN, out=tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_weights_are_read_from_files_and_compared(tmp_path: Path) -> None:
    from espalier.flows.given import load_weights

    state = {k: v.contiguous() for k, v in trained().state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    np.savez(tmp_path / "w.npz", **{k: v.numpy() for k, v in state.items()})
    wrapped = {"state_dict": {f"module.{k}": v for k, v in state.items()}, "other": 1}
    torch.save(wrapped, tmp_path / "w.pt")
    for name in ("w.safetensors", "w.npz", "w.pt"):
        model = Small()
        load_weights(model, tmp_path / name)
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    with pytest.raises(DataError, match=r"fc.weight.*\(10, 12\).*\(7, 12\)"):
        load_weights(Small(7), tmp_path / "w.npz")
    save_file({k: v for k, v in state.items() if k != "fc.bias"}, tmp_path / "less.safetensors")
    with pytest.raises(DataError, match=r"it lacks 'fc\.bias'"):
        load_weights(Small(), tmp_path / "less.safetensors")
    (tmp_path / "broken.pt").write_bytes(b"not a file of weights")
    with pytest.raises(DataError, match=r"broken\.pt"):
        load_weights(Small(), tmp_path / "broken.pt")


def test_a_study_of_another_model_is_not_resumed(found: esp.Shrunk) -> None:
    with pytest.raises(StudyError, match="limits"):
        tiny_shrink(found.folder, resume=True, within={"bytes": "50%"})
    with pytest.raises(StudyError, match="resume"):
        tiny_shrink(found.folder)
