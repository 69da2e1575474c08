"""Training to the end: finalists and baselines alike, then measured again and tested once."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from espalier import train
from espalier.errors import BudgetError, StudyError
from espalier.flows.evaluate import Finish, Start
from espalier.flows.job import Job
from espalier.flows.measuring import Measuring
from espalier.flows.plan import fit_epochs
from espalier.flows.weights import trained_network, weights_path
from espalier.problem import Reading, front
from espalier.space import Candidate
from espalier.study import Trial

ANSWER = "shrunk"  # the entry of a shrink's own answer


def named(name: str, solver: str) -> str:
    """What an entry of a shrink is called where another one is handed out."""
    return f"the answer of {solver}" if name == ANSWER else name


@dataclass
class Entry:
    """A trained and measured candidate: a row of the result."""

    candidate: Candidate
    name: str
    metrics: dict[str, Reading]
    start: str = ""


def finish(job: Job, chosen: Sequence[Candidate]) -> dict[Candidate, Entry]:
    """Trains each from the supernet's weights and from scratch, keeps the better start by
    validation, measures it again and tests it once."""
    starts: tuple[Start, ...] = ("supernet", "scratch") if job.shared else ("scratch",)
    epochs = int(job.study.once("final epochs", lambda: _final_epochs(job, len(chosen))))
    better = job.quality.goal == "max"
    best: dict[Candidate, tuple[Start, Trial]] = {}
    failed = ""
    for start in starts:
        for trial in _train(job, chosen, start, epochs):
            if trial.state != "done":
                failed = trial.error or "unknown error"
                continue
            old = best.get(trial.candidate)
            if old is None or (_validated(job, trial) > _validated(job, old[1])) == better:
                best[trial.candidate] = (start, trial)
    if not best:
        last = failed.strip().splitlines()[-1]
        raise StudyError(f"every training to the end failed, the last one with: {last}")
    job.show.phase("measuring and testing the trained networks", len(best))
    return {c: _entry(job, c, start, trial.metrics) for c, (start, trial) in best.items()}


def _train(job: Job, chosen: Sequence[Candidate], start: Start, epochs: int) -> list[Trial]:
    job.show.phase(f"training to the end, from {start}", len(chosen))
    done = itertools.count(1)
    # weights that are good already want smaller steps
    lr = job.recipe.lr * (0.5 if start == "supernet" else 1.0)
    recipe = replace(job.recipe, epochs=epochs, lr=lr)
    return job.study.map(
        f"final from {start}",
        chosen,
        Finish(job.family, job.task, recipe, job.seed, start, job.study.folder),
        executor=job.executor(),
        on_trial=lambda trial: job.show.step(next(done), len(chosen)),
    )


def _validated(job: Job, trial: Trial) -> float:
    return trial.metrics[f"{job.quality.name}_validation"].value


def _final_epochs(job: Job, count: int) -> int:
    """What was planned, or what the time that is left allows if the machine became slower."""
    if job.budget.seconds is None or "final_epoch" not in job.speed:
        return job.plan.final_epochs
    left = job.budget.seconds - job.spent() - 6.0  # export and report
    planned = job.plan.supernet_epochs * job.speed["supernet_epoch"]
    slower = job.study.phase_seconds().get("supernet", 0.0) / planned if planned else 1.0
    starts = 2 if job.shared else 1
    return fit_epochs(job.plan, left, slower, job.speed, job.workers, starts * count)


def _entry(job: Job, candidate: Candidate, start: Start, final: dict[str, Reading]) -> Entry:
    """Measures the trained network, tests it once, and puts all its numbers together."""
    weights = weights_path(job.study.folder, candidate, start)
    network = trained_network(job.family, candidate, weights)
    return whole_entry(job, candidate, network, start, final)


def whole_entry(
    job: Measuring, candidate: Candidate, network: torch.nn.Module, start: str,
    final: Mapping[str, Reading],
) -> Entry:  # fmt: skip
    """A row of the result: prices, the latency measured again, `final`, the test read once."""
    metrics = dict(job.price(candidate))
    if "latency_ms" in metrics:
        metrics["latency_ms_predicted"] = metrics["latency_ms"]
    metrics["latency_ms"] = job.settled(candidate, network)
    metrics.update(final)
    if candidate in job.estimates:
        metrics[f"{job.quality.name}_estimated"] = job.estimates[candidate]
    tested = job.study.once(
        f"test/{candidate.id}/{start}", lambda: train.evaluate(network, job.task, "test")
    )
    for metric in job.task.metrics:
        if metric.name in tested:
            metrics[metric.name] = Reading(tested[metric.name], metric.unit, "measured", "test")
    return Entry(candidate, "", metrics, start)


def non_dominated(job: Job, entries: Sequence[Entry]) -> list[Entry]:
    """The front of trained, measured entries by validation quality and measured cost."""
    sign = -1.0 if job.quality.goal == "max" else 1.0
    values = np.array(
        [
            [
                sign * e.metrics[f"{job.quality.name}_validation"].value,
                e.metrics[job.axis].value,
            ]
            for e in entries
        ]
    )
    return [entries[i] for i in front(values)]


def check_kept(job: Measuring, entry: Entry) -> None:
    """Refuses a repaired model that is over a limit after all. Errors: `BudgetError` with how far."""
    if job.keeps(entry.metrics):
        return
    over = [x for x in job.limits if x.violation([entry.metrics[x.metric].value])[0] > 0]
    told = ", ".join(
        f"{x.metric} is {entry.metrics[x.metric].value:.4g} of {x.bound:.4g}" for x in over
    )
    raise BudgetError(
        f"the repaired {job.family.name} does not keep the limits as measured: {told}; "
        "raise the limit a little, or measure on a quieter machine"
    )
