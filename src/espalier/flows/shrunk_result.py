"""The result of a shrink as plain JSON: what the report draws and what scripts read."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, fields, is_dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from espalier.compress import Cut
from espalier.errors import EspalierError
from espalier.flows.decisions import told
from espalier.flows.finals import ANSWER, named
from espalier.flows.machine import versions
from espalier.flows.repairing import stages_key
from espalier.flows.result import beaten, disturbances, entry_json, network_rows, question
from espalier.flows.shrinking import LATENCY

if TYPE_CHECKING:
    from espalier.flows.finals import Entry
    from espalier.flows.language.job import LanguageJob
    from espalier.flows.shrinking import Shrinking
    from espalier.flows.shrunk import Shrunk
    from espalier.solvers.allocate import Profile


def shrunk_json(
    job: Shrinking, found: Shrunk, solver: tuple[str, str], left_out: Sequence[str], seconds: float
) -> dict[str, Any]:
    """Everything about a finished shrink, with how each number was obtained."""
    phases = job.study.phase_seconds()
    error = job.predicted.error if job.predicted else {}
    return {
        "espalier": versions()["espalier"],
        "title": f"{job.family.name} made smaller for {job.task.name}",
        "quality": job.quality.name,
        "goal": job.quality.goal,
        "question": question(job),
        "best": entry_json(found.best),
        "front": [],
        "baselines": [entry_json(e) for e in (*found.baselines, found.original)],
        "budget": {
            "asked": str(job.budget),
            "seconds": round(sum(phases.values()), 2),
            "kept": {x.metric: job.keeps(found.best.metrics) for x in job.limits},
        },
        "seconds": {**{k: round(v, 2) for k, v in phases.items()}, "this_run": round(seconds, 2)},
        "files": {},
        "trials": [],
        "latency": error,
        "network": network_rows(job, found),
        "shrink": {
            "original": entry_json(found.original),
            "solver": _decided_by(found, *solver),
            "images": job.calibrated.samples,
            "measure": job.measure,
            "rounds": job.rounds,
            "spent": list(spent_rows(job, found.best)),
            "sensitivity": list(sensitivity_rows(job, found.best)),
            "repair": [_repair_row(job, e) for e in (found.best, *found.baselines)],
            "ignored": found.ignored,
        },
        "verdicts": [
            *beaten(job, found.best, found.baselines),
            *(f"Over the limit as measured and left out: {n}." for n in left_out),
        ],
        "notes": [
            *job.study.notes,
            *_beside(job),
            *_from_rivals(found, solver[0]),
            *_untuned(job),
            *_against_greedy(job, found),
            *disturbances(job, error, found.best),
        ],
        "reproduce": reproduce(job),
    }


def _against_greedy(job: Shrinking, found: Shrunk) -> list[str]:
    """What the exact program gains over taking one decision after another."""
    ours, theirs = job.greedy.get(found.best.candidate, (0.0, 0.0))
    if ours == theirs:
        return []
    other = f"{theirs:.4g}" if math.isfinite(theirs) else "no answer"
    return [
        f"By what each option harms alone, the exact program's answer harms {ours:.4g}; greedy "
        f"allocation, the most harm saved per cost, under the same limits: {other}."
    ]


def _decided_by(found: Shrunk, solver: str, why: str) -> dict[str, str]:
    """The solver, or the rival that is handed out in its place."""
    instead = _instead(found, solver)
    if not instead:
        return {"name": solver, "why": why}
    return {"name": found.best.name, "why": f"{instead}; {solver} was taken because {why}"}


def _from_rivals(found: Shrunk, solver: str) -> list[str]:
    """Whether a rival is handed out, and why."""
    instead = _instead(found, solver)
    return [f"{instead}: it is what is handed out."] if instead else []


def _instead(found: Shrunk, solver: str) -> str:
    """Why a rival is handed out; '' where the solver's answer is."""
    name, answer = found.best.name, named(ANSWER, solver)
    if name == ANSWER:
        return ""
    if any(e.name == answer for e in found.baselines):
        return f"{name} was better on validation than {answer}, and keeps the limits"
    return f"{answer} was over the limits once it was repaired; {name} keeps them"


def _untuned(job: Shrinking) -> list[str]:
    """Which baselines were not fine-tuned, and why."""
    return [
        f"The baseline {name} was not fine-tuned: the time for it went in equal shares to the answer and "
        "to the baselines that were better on validation after least squares."
        for name in job.untuned
    ]


def _beside(job: Shrinking) -> list[str]:
    """How latency was read where its limit is a share."""
    if not job.beside:
        return []
    return [
        "Latencies are shares of the original's, which was timed in turns with every network; their "
        "milliseconds are at the pace that the machine had when the original was measured first."
    ]


def spent_rows(job: Shrinking, best: Entry) -> Iterator[dict[str, Any]]:
    """For every layer and every limited cost that adds up: the original's and what is left of it."""
    from espalier.flows.solving import factors_of

    space = job.family.space
    rows = space.canonical(space.encode([job.family.original, best.candidate]))
    for limit in job.limits:
        try:
            factors = factors_of(job, [limit.metric])[limit.metric]
        except EspalierError:
            continue  # a cost that is only known of whole networks
        total: dict[str, Any] = {}  # what many decisions decide has several factors
        for i, factor in enumerate(factors):
            name = factor.name or ("overhead" if not factor.decisions else f"part {i}")
            total[name] = total.get(name, 0.0) + factor.at(space, rows)
        for name, (before, after) in total.items():
            if before or after:
                yield {
                    "layer": name,
                    "metric": limit.metric,
                    "original": float(before),
                    "spent": float(after),
                }


def sensitivity_rows(job: Shrinking | LanguageJob, best: Entry) -> Iterator[dict[str, Any]]:
    """For every option: its harm alone, what it saves of each limited cost, whether it was chosen."""
    if job.profile is None:
        return
    space, harm = job.family.space, _alone(job.profile)
    for decision in space.decisions:
        rows = np.repeat(space.corner(last=True), decision.count, axis=0)
        rows[:, space.names.index(decision.name)] = np.arange(decision.count)
        prices = job.pricing(space.canonical(rows))
        for i, option in enumerate(decision.options):
            yield {
                "decision": decision.name,
                "option": option,
                "harm": harm[decision.name][i] if decision.name in harm else None,
                "chosen": best.candidate.get(decision.name) == option,
                "saved": {
                    x.metric: float(1 - prices[x.metric][i] / prices[x.metric][-1])
                    for x in job.limits
                    if x.metric in prices
                },
            }


def _alone(profile: Profile) -> dict[str, list[float]]:
    """The harm of each decision's options, everything else as in the original."""
    out = {}
    for factor in profile.factors:
        if factor.name in factor.decisions:
            place = factor.decisions.index(factor.name)
            line = np.moveaxis(factor.values, place, 0)
            out[factor.name] = [float(v) for v in line.reshape(len(line), -1)[:, -1]]
    return out


def _repair_row(job: Shrinking, entry: Entry) -> dict[str, Any]:
    """The stages of one repair: validation quality after each."""
    recorded = job.study.once(stages_key(entry.candidate, entry.start), dict)
    name = job.quality.name
    return {
        "name": entry.name,
        "id": entry.candidate.id,
        LATENCY: entry.metrics[LATENCY].value,
        "stages": [
            {
                "stage": s["stage"],
                "quality": s["metrics"][name],
                "seconds": s["seconds"],
                "kept": s["kept"],
            }
            for s in recorded["stages"]
        ],
    }


def reproduce(job: Shrinking) -> dict[str, Any]:
    """The command and the Python that run this shrink again, limits as they were asked for."""
    kinds = ",".join(dict.fromkeys(told(cut) or cut.kind for cut in job.cuts))
    runtime, flags = job.runtime, list[str]()
    for name, value, usual in (
        ("solver", job.solver, "auto"),
        ("measure", job.measure, "divergence"),
        ("device", runtime.device, "cpu"),
        ("threads", runtime.threads, 1),
        ("batch", runtime.batch, 1),
    ):
        flags += [f"--{name} {shlex.quote(str(value))}"] if value != usual else []
    flags += [] if job.repair else ["--no-repair"]
    flags += [] if job.tune else ["--no-tune"]
    flags += [] if job.baselines else ["--no-baselines"]
    # several limits on one cost: a name is given once
    asked = job.asked if len({x.metric for x in job.asked}) == len(job.asked) else job.limits
    command = " ".join(
        [
            f"espalier shrink MODEL --weights WEIGHTS --task {shlex.quote(job.task.text or 'TASK')}",
            *(f"--max {x.metric}={x.amount()}" for x in asked if x.op == "<="),
            f"--decisions {shlex.quote(kinds)} --budget {shlex.quote(str(job.budget).replace(' ', ''))}",
            *(f"--seed {job.seed}", *flags),
        ]
    )
    if not all(told(cut) for cut in job.cuts):
        command += "  # and the settings of the cuts, which only Python can say"
    within = {x.metric: f"{x.op} {x.amount()}" for x in asked}
    cuts = ", ".join(f"esp.compress.{_called(cut)}" for cut in job.cuts)
    python = (
        f"esp.shrink(model, {repr(job.task.text) if job.task.text else 'task'}, within={within!r}, on=esp.costs.{runtime!r}, "
        f"decisions=[{cuts}], budget={str(job.budget)!r}, solver={job.solver!r}, "
        f"measure={job.measure!r}, repair={job.repair}, {'' if job.tune else 'tune=False, '}"
        f"baselines={job.baselines}, seed={job.seed})"
    )
    return {"command": command, "python": python, "versions": versions()}


def _called(cut: Cut) -> str:
    """The call that makes a cut; tensors that were given are named only."""
    given: list[str] = []
    every: tuple[Field[Any], ...] = fields(cut) if is_dataclass(cut) else ()
    for f in every:
        value = getattr(cut, f.name)
        if isinstance(value, Tensor):
            given.append(f"{f.name}={f.name.upper()}")
        elif value != f.default and not isinstance(value, Mapping):
            given.append(f"{f.name}={value!r}")
    return f"{type(cut).__name__}({', '.join(given)})"
