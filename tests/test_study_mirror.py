"""The mirror of a ledger in Optuna, and what is said without Optuna."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import study_toys as toys
from espalier.errors import MissingExtra
from espalier.problem import Metric, Problem, Reading
from espalier.solvers.strategies import make
from espalier.space import Candidate, Space, choice, integer, ordinal, real
from espalier.study import Serial, Study
from espalier.study.mirror import mirror, serve

SPACE = Space(
    [
        choice("kind", "plain", "rich"),
        ordinal("width", 8, 16, 32),
        integer("depth", 1, 4, when={"kind": ("rich",)}),
        real("rate", 1e-3, 1.0, log=True),
        choice("skip", True, False),
    ]
)
PROBLEM = Problem((Metric("accuracy", goal="max"), Metric("cost")))


def evaluate(candidate: Candidate) -> dict[str, Reading]:
    if candidate["width"] == 32:
        raise RuntimeError("too wide")
    return {
        "accuracy": Reading(float(candidate["rate"])),
        "cost": Reading(float(candidate["width"])),
        "extra": Reading(7.0),
    }


def final(candidate: Candidate) -> dict[str, Reading]:
    return {"accuracy_validation": Reading(0.5), "loss": Reading(0.1)}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    with Study.create(tmp_path / "run", {"a": 1}) as study:
        trials = study.search(
            "search", PROBLEM, make("nsga2", SPACE, 0), evaluate,
            trials=30, batch=10, executor=Serial(),
        )  # fmt: skip
        done = [t.candidate for t in trials if t.state == "done"]
        study.map("final", done[:3], final, executor=Serial())
    return tmp_path / "run"


def test_every_finished_trial_is_mirrored(run: Path) -> None:
    optuna = pytest.importorskip("optuna", reason="needs the extra 'dashboard'")
    with Study.open(run) as study:
        for _ in range(2):  # a mirror is written anew
            storage = mirror(study)
        ours = study.trials("search")
    names = {s.study_name for s in optuna.get_all_study_summaries(storage)}
    assert names == {"run: search", "run: final"}
    theirs = optuna.load_study(study_name="run: search", storage=storage)
    assert [d.name for d in theirs.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert theirs.metric_names == ["accuracy", "cost"]
    assert theirs.user_attrs["strategy"] == "nsga2"
    assert len(theirs.trials) == len(ours) == 30
    assert {t.state.name for t in theirs.trials} == {"COMPLETE", "FAIL"}
    for their, our in zip(theirs.trials, ours, strict=True):
        assert their.params == our.candidate.to_json()
        assert set(their.distributions) == set(our.candidate)
        assert their.user_attrs["candidate"] == our.candidate.id
        if our.state == "done":
            assert their.values == [our.metrics["accuracy"].value, our.metrics["cost"].value]
            assert their.user_attrs["extra"] == 7.0
        else:
            assert "too wide" in their.user_attrs["error"]
    assert theirs.best_trials
    mapped = optuna.load_study(study_name="run: final", storage=storage)
    assert mapped.metric_names == ["accuracy_validation", "loss"]
    assert [d.name for d in mapped.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert len(mapped.trials) == 3


def test_broken_limits_are_constraints_to_optuna(tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna", reason="needs the extra 'dashboard'")
    from espalier.problem import Limit

    problem = Problem((Metric("error"),), (Limit("error", 20.0),))
    with Study.create(tmp_path / "run", toys.IDENTITY) as study:
        ours = toys.search(study, problem=problem, trials=20)
        theirs = optuna.load_study(study_name="run: search", storage=mirror(study))
    got = [t.system_attrs["constraints"] for t in theirs.trials]
    assert got == [[t.violation] for t in ours]
    assert any(c[0] > 0 for c in got)


def test_an_empty_study_has_an_empty_mirror(tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna", reason="needs the extra 'dashboard'")
    with Study.create(tmp_path / "run", toys.IDENTITY) as study:
        assert optuna.get_all_study_summaries(mirror(study)) == []


def test_the_dashboard_is_served_on_this_machine_only(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dashboard = pytest.importorskip("optuna_dashboard", reason="needs the extra 'dashboard'")
    got: dict[str, object] = {}

    def run_server(storage: object, host: str, port: int) -> None:
        got.update(storage=storage, host=host, port=port)

    monkeypatch.setattr(dashboard, "run_server", run_server)
    with Study.open(run) as study:
        serve(study, 8123)
    assert (got["host"], got["port"]) == ("127.0.0.1", 8123)


def test_a_missing_extra_is_named_with_its_command(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.setitem(sys.modules, "optuna_dashboard", None)
    with Study.open(run) as study:
        with pytest.raises(MissingExtra, match=r"pip install 'espalier\[dashboard\]'"):
            mirror(study)
        with pytest.raises(MissingExtra, match="optuna-dashboard is not installed"):
            serve(study)
    assert not (run / "dashboard.journal").exists()
