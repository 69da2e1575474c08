"""A study in Optuna's dashboard: its ledger copied to an Optuna journal beside it.

The mirror is a picture of the moment: it is written anew each time, and never read back.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from espalier.errors import MissingExtra
from espalier.space import Categorical, Integer, Ordinal, Real, Space
from espalier.study.study import Study
from espalier.study.trial import Trial

FILE = "dashboard.journal"


def mirror(study: Study) -> Any:
    """An Optuna storage with every finished trial, an Optuna study a phase.

    A phase that was searched has its objectives as values with their directions; a phase that was
    mapped has every metric that all its trials share. Metrics, violation, seconds and worker are
    user attributes. Raises `MissingExtra` without Optuna.
    """
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError:
        raise MissingExtra("optuna", "dashboard") from None
    path = study.folder / FILE
    path.unlink(missing_ok=True)
    storage = JournalStorage(JournalFileBackend(str(path)))
    meta = study.meta
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        for phase in dict.fromkeys(t.phase for t in study.trials()):
            _copy(storage, study, phase, meta)
    finally:
        optuna.logging.set_verbosity(verbosity)
    return storage


def serve(study: Study, port: int = 8080) -> None:
    """Mirrors the study and serves the dashboard on this machine until it is interrupted.

    Raises `MissingExtra` without optuna-dashboard.
    """
    try:
        from optuna_dashboard import run_server
    except ImportError:
        raise MissingExtra("optuna-dashboard", "dashboard") from None
    run_server(mirror(study), host="127.0.0.1", port=port)


def _copy(storage: Any, study: Study, phase: str, meta: dict[str, Any]) -> None:
    import optuna

    trials = [t for t in study.trials(phase) if t.state in ("done", "failed")]
    about = meta.get(f"phase/{phase}")
    goals = _goals(trials, about, meta)
    if not trials or not goals:
        return
    made = optuna.create_study(
        storage=storage,
        study_name=f"{study.folder.resolve().name}: {phase}",
        directions=["maximize" if goal == "max" else "minimize" for goal in goals.values()],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        made.set_metric_names(list(goals))
    for key, value in (about or {}).items():
        if key in ("strategy", "limits"):
            made.set_user_attr(key, value)
    domains = _domains(trials, about)
    for trial in trials:
        made.add_trial(_frozen(trial, list(goals), domains))


def _goals(
    trials: Sequence[Trial], about: dict[str, Any] | None, meta: dict[str, Any]
) -> dict[str, str]:
    """Objectives and their goals. A mapped phase has no problem: a metric that begins like a
    maximised objective of the study ("accuracy_validation") is maximised too."""
    if about is not None:
        return {o["name"]: o["goal"] for o in about["objectives"]}
    raised = tuple(
        objective["name"]
        for key, value in meta.items()
        if key.startswith("phase/")
        for objective in value["objectives"]
        if objective["goal"] == "max"
    )
    rows = [set(t.metrics) for t in trials if t.state == "done"]
    shared = sorted(set.intersection(*rows)) if rows else []
    return {name: "max" if name.startswith(raised) else "min" for name in shared}


def _domains(trials: Sequence[Trial], about: dict[str, Any] | None) -> dict[str, Any]:
    """An Optuna distribution a decision: from the space, or from what occurred."""
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if about is None:
        seen: dict[str, dict[Any, None]] = {}
        for trial in trials:
            for name, option in trial.candidate.items():
                seen.setdefault(name, {})[option] = None
        return {n: CategoricalDistribution(sorted(o, key=repr)) for n, o in seen.items()}
    out: dict[str, Any] = {}
    for decision in Space.from_json(about["space"]).decisions:
        match decision:
            case Real():
                out[decision.name] = FloatDistribution(
                    decision.low, decision.high, log=decision.log
                )
            case Integer():
                out[decision.name] = IntDistribution(decision.low, decision.high)
            case Categorical() | Ordinal():
                out[decision.name] = CategoricalDistribution(decision.options)
    return out


def _frozen(trial: Trial, goals: list[str], domains: dict[str, Any]) -> Any:
    from optuna.trial import TrialState, create_trial

    done = trial.state == "done"
    attributes: dict[str, Any] = {name: r.value for name, r in trial.metrics.items()}
    attributes |= {
        "candidate": trial.candidate.id,
        "violation": trial.violation,
        "seconds": trial.seconds,
        "attempts": trial.attempts,
        "worker": trial.worker,
    }
    if trial.error:
        attributes["error"] = trial.error
    params = trial.candidate.to_json()
    return create_trial(
        state=TrialState.COMPLETE if done else TrialState.FAIL,
        values=[trial.metrics[name].value for name in goals] if done else None,
        params=params,
        distributions={name: domains[name] for name in params},
        user_attrs=attributes,
        # where Optuna's dashboard looks for broken limits
        system_attrs={"constraints": [trial.violation]},
    )
