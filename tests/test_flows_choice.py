"""What a shrink chooses within its limits: once a study, by each kind of candidate, on one machine."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import espalier as esp
from espalier.costs.runtime import BusyMachine
from espalier.costs.side_by_side import Ratio
from espalier.errors import BudgetError, EspalierError, NotInTimeError
from espalier.flows import fitting, repairing, rivals
from espalier.flows.finals import Entry
from espalier.flows.progress import Silent
from espalier.flows.shrink_identity import PAID
from espalier.flows.shrinking import LATENCY, Shrinking
from espalier.flows.shrunk import best_first
from espalier.flows.shrunk_result import spent_rows
from espalier.problem import Limit, Metrics, Reading, SearchBudget, tightest
from espalier.solvers.allocate import Factor
from espalier.space import Candidate, Space, integer
from espalier.study import Study
from test_flows_shrink import TIMED, Interrupting, Number, fake_job, largest, tiny_shrink

pytestmark = pytest.mark.usefixtures("quick_tables")

pytest.importorskip("ortools")


def refusing(limits: Any) -> Any:
    raise BudgetError("there are no such layers")


# --- once a study ------------------------------------------------------------------------------


def test_what_was_chosen_stays_where_a_shrink_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed one has less time left, and a program that runs into its end finds something else."""
    monkeypatch.setattr("espalier.flows.shrinking.ratio", lambda *args: Ratio(0.5, 0.0, 3))
    settings = {"within": {LATENCY: "95%", "bytes": "90%"}, **TIMED, "repair": True, "tune": False}
    with pytest.raises(KeyboardInterrupt):
        tiny_shrink(tmp_path / "run", progress=Interrupting("shrunk: least squares"), **settings)
    with Study.open(tmp_path / "run") as study:
        chosen = study.recorded()["chosen"]
    monkeypatch.setattr("espalier.flows.shrink.best_fitted", None)
    again = tiny_shrink(tmp_path / "run", resume=True, **settings)
    assert again.best.candidate == Candidate.from_json(chosen["wanted"]["shrunk"])
    assert again.to_json()["shrink"]["rounds"] == chosen["rounds"] != []


def test_rounds_and_greedy_answers_are_kept_with_the_choice() -> None:
    known: dict[str, Any] = {}

    def once(key: str, compute: Any) -> Any:
        return known.setdefault(key, json.loads(json.dumps(compute() if key not in known else 0)))

    def job() -> Any:
        return SimpleNamespace(
            rounds=[{"name": "before"}], greedy={}, study=SimpleNamespace(once=once)
        )

    first, second, candidate = job(), job(), Candidate({"a": 1, "b": "2:4"})

    def choose() -> dict[str, Candidate]:
        first.rounds.append({"name": "shrunk", "bound": 0.1})
        first.greedy[candidate] = (0.25, float("inf"))
        return {"shrunk": candidate}

    assert Shrinking.chosen(first, "chosen", choose) == {"shrunk": candidate}
    assert Shrinking.chosen(second, "chosen", choose) == {"shrunk": candidate}
    for each in (first, second):
        assert [r["name"] for r in each.rounds] == ["before", "shrunk"]
        assert each.greedy == {candidate: (0.25, float("inf"))}


def test_masks_learn_as_many_epochs_as_they_were_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many the time allows is found out once: a checkpoint goes on in its own training only."""
    settings: dict[str, Any] = {"solver": "relax", "repair": False, "baselines": False}
    epochs = iter([2, 3])
    monkeypatch.setattr("espalier.flows.gating._epochs", lambda job, dearer: next(epochs))

    class AfterOne(Silent):
        def phase(self, name: str, total: int) -> None:
            self.now = name

        def step(self, done: int, total: int, text: str = "") -> None:
            if self.now.startswith("masks learn"):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny_shrink(tmp_path / "run", progress=AfterOne(), **settings)
    assert (tmp_path / "run" / "gates.safetensors").exists()
    found = tiny_shrink(tmp_path / "run", resume=True, **settings)
    assert "relax" in found.to_json()["reproduce"]["command"]


def test_an_answer_that_was_a_rival_without_training_is_trained_after_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    began: list[tuple[str, str]] = []
    monkeypatch.setattr(
        repairing, "repaired", lambda job, c, start, make, tuned: began.append((c.id, start))
    )
    monkeypatch.setattr(repairing, "entry_of", lambda job, c, start: Entry(c, "", {}, start))
    stages = {"a": ["cut", "least squares"], "b": ["cut", "fine-tuned"]}
    recorded = {f"repair/{k}": {"stages": [{"stage": s} for s in v]} for k, v in stages.items()}
    job: Any = SimpleNamespace(
        study=SimpleNamespace(once=lambda key, compute: compute(), recorded=lambda: recorded),
        trains=True, untuned=[], resting={}, left=lambda: 100.0, last_seconds=8.0,
        reading=lambda networks, closed: 0.0,
        task=SimpleNamespace(size=lambda split: 100),
        family=SimpleNamespace(original=Number(id="whole")),
    )  # fmt: skip
    for name in "abc":
        repairing.repair_all(job, {"shrunk": Number(id=name)}, again=True)
    assert began == [("a", "repaired again"), ("b", "repaired"), ("c", "repaired")]


# --- within the limits -------------------------------------------------------------------------


def test_only_the_answer_falls_back_on_the_smallest_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A baseline that can't keep the limits by its own rule is left out."""
    monkeypatch.setattr(fitting, "least", lambda job, metric: Number(id=10))
    job = fake_job(1.0)
    with pytest.raises(BudgetError, match="nothing of this kind keeps 50 ms"):
        fitting.fitted(job, "uniform width", refusing)
    assert fitting.best_fitted(job, "shrunk", {"one": refusing})["shrunk"].id == 10
    both = fitting.best_fitted(job, "shrunk", {"mixed": largest, "all in float": refusing})
    assert list(both) == ["shrunk"]
    monkeypatch.setattr(rivals, "uniform", lambda job: refusing)
    monkeypatch.setattr(rivals, "by_chance", lambda job: largest)
    job.family.cuts = ()
    assert list(rivals.rivals(job)) == ["random"]


def test_a_smallest_that_is_not_found_in_time_says_why_nothing_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def late(job: Any, metric: str) -> Any:
        raise NotInTimeError("nothing in time")

    monkeypatch.setattr(fitting, "least", late)
    with pytest.raises(BudgetError, match="nothing of this kind"):
        fitting.best_fitted(fake_job(1.0), "shrunk", {"one": refusing})


def test_random_candidates_are_judged_where_the_limit_has_moved_to() -> None:
    space = Space([integer("a", 0, 9), integer("b", 0, 9)])
    cost = (esp.Metric(LATENCY, "ms", "min", "predicted"),)
    job: Any = SimpleNamespace(
        family=SimpleNamespace(space=space),
        seed=0, options=1000, budget=SearchBudget(), show=Silent(),
        pricing=lambda codes: Metrics({LATENCY: codes.sum(1).astype(float)}, cost),
        harm=lambda found: [float(9 - c["a"]) for c in found],
    )  # fmt: skip
    solve = rivals.by_chance(job)
    for bound in (18.0, 8.0):
        found = solve([Limit(LATENCY, bound)])
        assert 0.85 * bound <= found["a"] + found["b"] <= bound
        assert found["a"] == min(9, int(bound))  # the least harm of those
    judged = job.harm
    job.budget, late = SearchBudget(seconds=0.0), []
    job.harm = lambda found: late.append(found) or judged(found)
    solve = rivals.by_chance(job)
    for bound in (18.0, 18.0, 17.5):  # rows that are known cost nothing
        solve([Limit(LATENCY, bound)])
    assert len(late) <= 8


def test_of_two_limits_on_one_cost_the_tighter_counts(tmp_path: Path) -> None:
    loose, tight, least = Limit("macs", 5.0), Limit("macs", 3.0), Limit("macs", 1.0, ">=")
    assert tightest([loose, least, tight]) == tightest([tight, least, loose]) == (tight, least)
    assert tightest([least, Limit("macs", 2.0, ">=")]) == (Limit("macs", 2.0, ">="),)
    limits = [Limit("bytes", 1e9), Limit("bytes", 0.6, relative=True)]  # in Python alone
    found = tiny_shrink(tmp_path / "run", within=limits, repair=False, baselines=False)
    (told,) = found.to_json()["question"]["limits"]
    assert told["bound"] == pytest.approx(0.6 * found.original.metrics["bytes"].value)
    assert found.to_json()["reproduce"]["command"].count("--max bytes=") == 1


def test_a_layer_that_many_decisions_decide_is_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    space = Space([integer("a", 0, 1), integer("b", 0, 1)])
    factors = [
        Factor((), np.array(10.0), name="joined"),
        Factor(("a",), np.array([-2.0, 0.0]), name="joined"),
        Factor(("b",), np.array([-1.0, 0.0]), name="joined"),
        Factor(("b",), np.array([4.0, 5.0]), name="other"),
    ]
    monkeypatch.setattr("espalier.flows.solving.factors_of", lambda job, names: {"macs": factors})
    whole, cut = (Candidate({"a": v, "b": v}) for v in (1, 0))
    job: Any = SimpleNamespace(
        family=SimpleNamespace(space=space, original=whole), limits=[Limit("macs", 8.0)]
    )
    rows = {r["layer"]: (r["original"], r["spent"]) for r in spent_rows(job, Entry(cut, "", {}))}
    assert rows == {"joined": (10.0, 7.0), "other": (5.0, 4.0)}


def test_a_metric_that_is_no_number_is_the_worst(monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([float("nan"), float("nan"), 0.5])
    monkeypatch.setattr("espalier.train.evaluate", lambda *args: {"q": next(values)}, raising=False)
    quality = SimpleNamespace(name="q", goal="max")
    repair: Any = SimpleNamespace(
        job=SimpleNamespace(task=None, quality=quality, show=Silent()),
        name="random", top=-float("inf"), started=0.0, stages=[],
    )  # fmt: skip
    for stage in ("cut", "least squares", "fine-tuned"):
        repairing._Repair.judge(repair, stage, torch.nn.Identity())
    assert [s["kept"] for s in repair.stages] == [True, False, True]
    assert repair.top == 0.5
    rivals = {
        name: Entry(Number(id=name), name, {"q_validation": Reading(q)})
        for name, q in (("shrunk", float("nan")), ("random", 0.1), ("other", float("nan")))
    }
    job: Any = SimpleNamespace(quality=quality)
    assert best_first(job, rivals, "allocate")[0].name == "random"


# --- on one machine ----------------------------------------------------------------------------


def test_timings_of_another_machine_are_not_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tiny_shrink(tmp_path / "run", repair=False, baselines=False)
    with Study.open(first.folder) as study:
        identity = study.meta["identity"]
    timed, harm = (
        "original latency",
        next(k for k in PAID.of(first.folder, identity) if "harm" in k),
    )
    assert timed in PAID.of(first.folder, identity)
    monkeypatch.setattr("espalier.flows.machine.processor", lambda: "an abacus")
    assert timed not in PAID.of(first.folder, identity)
    assert harm in PAID.of(first.folder, identity)
    again = tiny_shrink(tmp_path / "run", resume=True, repair=False, baselines=False)
    assert any("begun on another machine" in note for note in again.to_json()["notes"])


@pytest.mark.parametrize("strict", [True, False])
def test_a_strict_runtime_refuses_shares_that_a_busy_machine_spoilt(
    strict: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("espalier.flows.shrinking.ratio", lambda *args: Ratio(0.5, 0.2, 9))
    job: Any = SimpleNamespace(given=(b"", None), runtime=SimpleNamespace(strict=strict))
    if not strict:
        assert Shrinking._share(job, b"").value == 0.5
        return
    with pytest.raises(BusyMachine, match="9 timings beside the original are apart by 40%"):
        Shrinking._share(job, b"")
    assert issubclass(BusyMachine, EspalierError)


def test_widths_between_are_drawn_where_time_runs_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("espalier.flows.shrinking._SENSED", 0.0)
    cuts = (esp.compress.Widths(multiple=2, steps=6), esp.compress.Bits((4, 8)))
    settings = {"decisions": cuts, "budget": "6s", "baselines": False, "within": {"bytes": "60%"}}
    found = tiny_shrink(tmp_path / "run", **settings)
    assert any("for want of time" in note for note in found.to_json()["notes"])
    with Study.open(found.folder) as study:
        keys = {k.rpartition("harm:")[2] for k in study.recorded()}
    measured = {k.partition(":")[2].partition(":")[2] for k in keys}
    assert not [k for k in measured if k.endswith(":between") and "width:" in k]
    assert [k for k in measured if k.endswith(":between") and "bits:" in k]
    again = tiny_shrink(tmp_path / "run", resume=True, **settings)
    assert again.best.candidate == found.best.candidate
    # another limit on the same profile measures nothing of it anew, whatever its time
    monkeypatch.setattr("espalier.flows.shrinking._SENSED", 1.0)
    other = settings | {"within": {"bytes": "70%"}, "budget": "1min", "reuse": found.folder}
    reused = tiny_shrink(tmp_path / "other", **other)
    with Study.open(reused.folder) as study:
        assert {k.rpartition("harm:")[2] for k in study.recorded() if "harm:" in k} <= keys
