"""The result of a search as plain JSON: what the report draws and what scripts read."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from espalier.costs import layers
from espalier.errors import StudyError
from espalier.flows.machine import machine, versions
from espalier.flows.measuring import how_many
from espalier.flows.ranking import ranking
from espalier.solvers.relax.collapse import without_weights
from espalier.study import Study, Trial

if TYPE_CHECKING:
    from espalier.flows.answer import Answer
    from espalier.flows.finals import Entry
    from espalier.flows.found import Found
    from espalier.flows.job import Job
    from espalier.flows.measuring import Measuring


def result_json(job: Job, found: Found, trials: Sequence[Trial], seconds: float) -> dict[str, Any]:
    """Everything about a finished search, with how each number was obtained."""
    table = [trial_row(job, t) for t in trials]
    phases = job.study.phase_seconds()
    return {
        "espalier": versions()["espalier"],
        "title": f"{job.family.name} for {job.task.name}",
        "quality": job.quality.name,
        "goal": job.quality.goal,
        "question": question(job),
        "best": entry_json(found.best),
        "front": [entry_json(e) for e in found.front],
        "baselines": [entry_json(e) for e in found.baselines],
        "supernet": {"epochs": job.plan.supernet_epochs} if job.shared else {},
        "architecture": architecture(job),
        "ranking": ranking(job),
        "plan": job.plan.to_json(),
        "budget": {
            "asked": str(job.budget),
            "seconds": round(sum(phases.values()), 2),
            "trials": sum(t.phase == "search" for t in trials),
            "kept": {x.metric: job.keeps(found.best.metrics) for x in job.limits},
        },
        "seconds": {**{k: round(v, 2) for k, v in phases.items()}, "this_run": round(seconds, 2)},
        "files": {},
        "progress": progress(job, trials),
        "trials": table,
        "latency": job.predicted.error,
        "decisions": decision_effects(job, trials),
        "network": network_rows(job, found),
        "verdicts": verdicts(job, found),
        "notes": [*job.study.notes, *disturbances(job, job.predicted.error, found.best)],
        "reproduce": reproduce(job),
    }


def question(job: Measuring) -> dict[str, Any]:
    """What was asked: task, family, limits, runtime, machine, seed, budget."""
    return {
        "task": {
            "name": job.task.name,
            "classes": job.task.classes,
            "shape": list(job.task.shape),
            **{split: job.task.size(split) for split in ("train", "validation", "test")},
        },
        "family": {
            "name": job.family.name,
            "size": how_many(job.family.space),
            "decisions": job.family.space.to_json()["decisions"],
        },
        "limits": [
            {
                "metric": x.metric,
                "op": x.op,
                "bound": x.bound,
                "unit": job.pricing.metrics[x.metric].unit,
            }
            for x in job.limits
        ],
        "runtime": job.runtime.about(),
        "machine": machine(),
        "seed": job.seed,
        "budget": str(job.budget),
    }


def entry_json(entry: Entry) -> dict[str, Any]:
    """One trained candidate with all its readings."""
    return {
        "id": entry.candidate.id,
        "name": entry.name,
        "candidate": entry.candidate.to_json(),
        "metrics": {k: r.to_json() for k, r in entry.metrics.items()},
        "start": entry.start,
    }


def trial_row(job: Job, trial: Trial) -> dict[str, Any]:
    """One trial, flat: what the scatter of the report needs."""
    return {
        "id": trial.id,
        "phase": trial.phase,
        "candidate": trial.candidate.to_json(),
        "state": trial.state,
        "violation": trial.violation,
        **{k: r.value for k, r in trial.metrics.items()},
    }


def progress(job: Job, trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """The best estimate so far, over trials, for each phase."""
    sign = 1.0 if job.quality.goal == "max" else -1.0
    rows = []
    for phase in dict.fromkeys(t.phase for t in trials):
        best, spent = -np.inf, 0.0
        for count, trial in enumerate((t for t in trials if t.phase == phase), 1):
            spent += trial.seconds or 0.0
            if trial.state == "done" and not trial.violation:
                best = max(best, sign * trial.metrics[job.quality.name].value)
            if np.isfinite(best):
                rows.append(
                    {
                        "phase": phase,
                        "trial": count,
                        "seconds": round(spent, 3),
                        "best": sign * best,
                    }
                )
    return rows


def architecture(job: Job) -> dict[str, Any]:
    """How the architecture was learned, where it was: a row an epoch, and what it came to."""
    found = job.relaxed
    if found is None:
        return {}
    space = job.family.space
    return {
        "options": {name: list(space[name].options) for name in found.probabilities},
        "operators": len(without_weights(job.family, list(found.probabilities))),
        "history": [dict(row) for row in found.history],
        "candidate": found.candidate.to_json(),
        "monitor": dict(found.monitor),
    }


def decision_effects(job: Job, trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """What each option does: mean quality and cost of the random trials that chose it, less the
    mean of all. Random trials only: those of a search are biased to what it likes."""
    done = [t for t in trials if t.state == "done" and t.phase == "random"]
    if not done:
        return []
    quality = np.array([t.metrics[job.quality.name].value for t in done])
    cost = np.array([t.metrics[job.axis].value for t in done])
    rows = []
    for decision in job.family.space.decisions:
        chosen = [t.candidate.get(decision.name) for t in done]
        for option in sorted({c for c in chosen if c is not None}, key=lambda o: (str(type(o)), o)):
            mask = np.array([c == option for c in chosen])
            if 3 <= mask.sum() < len(done):
                rows.append(
                    {
                        "decision": decision.name,
                        "option": option,
                        "n": int(mask.sum()),
                        "accuracy": float(quality[mask].mean() - quality.mean()),
                        "cost": float(cost[mask].mean() - cost.mean()),
                    }
                )
    return rows


def network_rows(job: Measuring, found: Answer) -> list[dict[str, Any]]:
    """The chosen network layer by layer, with the stage each layer belongs to."""
    rows = []
    for row in layers(found.network(), job.family.example()):
        stage = str(row["name"]).rsplit(".", 1)[0] if "." in str(row["name"]) else str(row["name"])
        rows.append({"stage": stage, "latency_ms": None, **row})
    return rows


def verdicts(job: Job, found: Found) -> list[str]:
    """Plain words where a baseline is missing, or not worse than what was found."""
    notes = []
    if not any(e.name == "random search" for e in found.baselines):
        refused = job.study.refused("random")
        notes.append(
            f"Random search found nothing within the limits: {refused['refused']} of the "
            f"{refused['asked']} candidates that it drew break them by price."
        )
    return [*notes, *beaten(job, found.best, found.baselines)]


def beaten(job: Measuring, best: Entry, baselines: Sequence[Entry]) -> list[str]:
    """Plain words where a baseline is not worse than the best on the test split."""
    sign = 1.0 if job.quality.goal == "max" else -1.0
    name = job.quality.name
    ours = sign * best.metrics[name].value
    notes = []
    for other in baselines:
        theirs = sign * other.metrics[name].value
        if theirs >= ours:
            word = "equals" if theirs == ours else "beats"
            notes.append(
                f"{other.name} {word} the found network on test {name}: "
                f"{other.metrics[name].value:.4f} against {best.metrics[name].value:.4f}."
            )
    return notes


def disturbances(job: Measuring, error: Mapping[str, Any], best: Entry) -> list[str]:
    """Plain words where other work on the machine may have spoiled a measured number; `error` is
    that of the latency table, empty where there is none."""
    notes = []
    if error.get("busy"):
        notes.append(f"Latency was calibrated on a busy machine: {error.get('reason')}.")
    if job.busy(best.candidate):
        notes.append("The machine was busy when the found network was measured.")
    if error.get("within_10_percent", 1.0) < 0.5:
        notes.append(
            "The predicted latency is off by more than 10% for most held-out networks; "
            "limits were kept by measuring."
        )
    return notes


def reproduce(job: Job) -> dict[str, Any]:
    """The command and the Python that run this search again."""
    within = {x.metric: f"{x.op} {x.bound:g}" for x in job.limits}
    flags = " ".join(f"--max {x.metric}={x.bound:g}" for x in job.limits if x.op == "<=")
    strategy = job.strategy if isinstance(job.strategy, str) else "nsga2"
    command = (
        f"espalier search --task {shlex.quote(job.task.text or 'TASK')} --family {job.family.name} {flags} "
        f"--budget {shlex.quote(str(job.budget).replace(' ', ''))} --seed {job.seed} "
        f"--strategy {strategy} --workers {job.workers}"
    )
    solver = "" if job.solver == "search" else f", solver={job.solver!r}"
    command += f" --solver {job.solver}" if solver else ""
    python = (
        f"esp.search({job.family.name!r}, {repr(job.task.text) if job.task.text else 'task'}, within={within!r}, "
        f"on=esp.costs.{job.runtime!r}, budget={str(job.budget)!r}, seed={job.seed}{solver})"
    )
    return {
        "command": command,
        "python": python,
        "versions": versions(),
        "recipe": asdict(job.recipe),
    }


def read_result(folder: Path) -> dict[str, Any]:
    """The result of a finished search, from its folder. Errors say how far an unfinished one is."""
    path = folder / "result.json"
    if not path.is_file():
        with Study.open(folder) as study:
            done = sum(t.state == "done" for t in study.trials())
        raise StudyError(
            f"{folder} has no result yet ({done} trials done): finish it with --resume"
        )
    try:
        read: dict[str, Any] = json.loads(path.read_text())
        if not {"question", "best"} <= set(read):
            raise KeyError("question, best")
    except (ValueError, KeyError, TypeError) as error:
        raise StudyError(f"{path} is not the result of a search ({error!r})") from error
    return read
