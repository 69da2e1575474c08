"""The result of a shrink of a language model as plain JSON: what the report draws."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from espalier.errors import EspalierError
from espalier.flows.language.generating import told
from espalier.flows.language.limits import KNOWN
from espalier.flows.language.reproducing import reproduce
from espalier.flows.machine import machine, versions
from espalier.flows.measuring import how_many
from espalier.flows.result import beaten, entry_json
from espalier.flows.shrunk_result import sensitivity_rows

if TYPE_CHECKING:
    from espalier.flows.finals import Entry
    from espalier.flows.language.job import LanguageJob
    from espalier.flows.language.shrunk import ShrunkLanguage
    from espalier.solvers.allocate import Solution


def language_json(
    job: LanguageJob,
    found: ShrunkLanguage,
    solution: Solution,
    left_out: Sequence[str],
    seconds: float,
) -> dict[str, Any]:
    """Everything about a finished shrink, with how each number was obtained."""
    phases = job.study.phase_seconds()
    how = "proved best" if solution.optimal else "the best that was found in time"
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
        "shrink": {
            "original": entry_json(found.original),
            "solver": {
                "name": "allocate, then evolution",
                "why": f"{job.options} options of {len(job.family.space)} decisions were judged one "
                f"by one, the program's answer is {how}, and evolution on calibration text went on "
                "from it",
            },
            "images": job.harm_of.samples,
            "examples": "calibration windows",
            "measure": job.measure,
            "mended": job.mended,
            "curve": job.curve,
            "one_shape": one_shape(job),
            "times": job.times,
            "generation": job.generation,
            "rounds": job.rounds,
            "spent": list(spent_rows(job, found.best)),
            "sensitivity": list(sensitivity_rows(job, found.best)),
            "repair": [repair_row(job, e) for e in (found.best, *found.baselines)],
            "ignored": found.ignored,
        },
        "verdicts": [
            *beaten(job, found.best, found.baselines),
            *(f"The baseline {n} is over the limit as measured and is left out." for n in left_out),
        ],
        "notes": [
            *job.study.notes,
            *filter(None, [one_shape(job), times(job), told(job.generation)]),
        ],
        "reproduce": reproduce(job),
    }


def one_shape(job: LanguageJob) -> str:
    """One sentence on what it costs that all layers keep one shape, or why that is not known; ''
    where it was not asked."""
    if not job.one_shape:
        return ""
    if why := job.one_shape.get("why"):
        return f"What it costs that layers have one shape is not told: {why}."
    one, free = (job.one_shape[k]["loss"] for k in ("one shape", "layers apart"))
    word = "more" if one >= free else "less"
    return (
        f"Layers of one shape: the program's answer has a calibration loss of {one:.4g} nats a token, "
        f"with layers apart {free:.4g}, so one shape costs {abs(one - free):.2g} {word} (before the "
        "repair's training)."
    )


def times(job: LanguageJob) -> str:
    """One sentence on times where none is limited; '' where they were not measured."""
    if not job.times:
        return ""
    before, after, threads = (job.times[k] for k in ("original", "shrunk", "threads"))
    return (
        f"Measured once by torch on {threads} thread{'s' if threads > 1 else ''}: reading "
        f"{job.times['tokens']} tokens takes {after['prefill_ms']:.3g} ms (original "
        f"{before['prefill_ms']:.3g}), writing a token behind them {after['decode_ms']:.3g} ms "
        f"(original {before['decode_ms']:.3g}); no limit was on times."
    )


def question(job: LanguageJob) -> dict[str, Any]:
    """What was asked: text, model, limits, machine, seed, budget."""
    task = job.task
    return {
        "task": {
            "name": f"{task.name} ({task.tokens:,} tokens of {task.bytes_a_token:.2f} bytes), "
            f"windows of {task.context} tokens",
            **{split: task.size(split) for split in ("train", "validation", "test")},
        },
        "family": {
            "name": f"{job.family.name} ({job.folder.kind})",
            "size": how_many(job.family.space),
            "decisions": job.family.space.to_json()["decisions"],
        },
        "limits": [
            {
                "metric": x.metric,
                "op": x.op,
                "bound": x.bound,
                "unit": KNOWN[x.metric].unit,
            }
            for x in job.limits
        ],
        "runtime": {} if job.runtime is None else job.runtime.about(),
        "machine": machine(),
        "context": job.context,
        "grouped": job.grouped,
        "seed": job.seed,
        "budget": str(job.budget),
    }


def spent_rows(job: LanguageJob, best: Entry) -> Iterator[dict[str, Any]]:
    """For every part of the model and every limited cost: the original's, and what is left of it."""
    space = job.family.space
    rows = space.canonical(space.encode([job.family.original, best.candidate]))
    for limit in job.limits:
        try:
            factors = job.factors([limit.metric])[limit.metric]
        except EspalierError:
            continue  # a cost that is only known of whole models
        parts: dict[str, list[float]] = {}
        for factor in factors:
            before, after = (float(v) for v in factor.at(space, rows))
            own = parts.setdefault(factor.name or "the rest", [0.0, 0.0])
            own[0], own[1] = own[0] + before, own[1] + after
        for name, (before, after) in parts.items():
            if before or after:
                yield {"layer": name, "metric": limit.metric, "original": before, "spent": after}


def repair_row(job: LanguageJob, entry: Entry) -> dict[str, Any]:
    """The stages of one repair: validation loss after each, and the cost that is limited first."""
    recorded = job.study.once(f"repair/{entry.candidate.id}", dict)
    return {
        "name": entry.name,
        "id": entry.candidate.id,
        job.axis: entry.metrics[job.axis].value,
        "stages": [
            {
                "stage": s["stage"],
                "quality": s["metrics"][job.quality.name],
                "seconds": s["seconds"],
                "kept": s["kept"],
            }
            for s in recorded["stages"]
        ],
    }
