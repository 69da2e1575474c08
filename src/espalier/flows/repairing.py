"""Repair of what was cut: statistics, least squares, fine-tuning; the best stage is kept."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

from torch import nn

from espalier import train
from espalier.compress import repair
from espalier.compress.ranges import calibrate
from espalier.flows.finals import Entry, whole_entry
from espalier.flows.shrinking import Shrinking
from espalier.flows.weights import derive, save_weights, trained_network, weights_path
from espalier.problem import Reading
from espalier.space import Candidate
from espalier.train.evaluate import calibration

START, LATER = "repaired", "repaired again"  # the latter trains what was only mended before
_READ = 0.6  # of the time that is left, at most, is kept free for passes that only read
_TUNED = 3  # networks that are fine-tuned where time is limited, the answer among them
_LEAST = 1.0  # seconds of repair for each network, however little is left
_AGAIN = 0.25  # of the first share, where a smaller network has to be repaired after all


def repair_all(
    job: Shrinking, chosen: Mapping[str, Candidate], again: bool = False
) -> dict[str, Entry]:
    """Repairs each candidate, the answer first; measures and tests each.

    Time that is limited is split into at most `_TUNED` equal shares: the answer has one, and so have
    the rivals that are best by validation after least squares. The others, told in `job.untuned`,
    stay so: a baseline more takes nothing from the answer, and all that learn learn as long. What is
    repaired `again`, since the first answer was over a limit after all, has what is left of the time,
    and a quarter of the first share at least; a rival that was not fine-tuned now is.
    """
    names: dict[Candidate, str] = {}
    for name, candidate in chosen.items():
        names.setdefault(candidate, name)
    candidates = list(names)
    # closed forms that were paid for when answers were compared are part of a share
    paid = sum(one.used for c in candidates if (one := job.resting.get(c)) is not None)
    seconds = job.study.once("repair seconds", lambda: _share(job, len(candidates), paid))
    if again and seconds is not None:
        least = _AGAIN * seconds
        seconds = job.study.once(
            f"repair seconds/{candidates[0].id}", lambda: _share(job, len(candidates), paid, least)
        )

    starts = {c: LATER if again and _only_mended(job, c) else START for c in candidates}

    @cache
    def repair_of(candidate: Candidate) -> _Repair:
        start = starts[candidate]
        rested: _Repair | None = job.resting.pop(candidate, None) if start == START else None
        if rested is not None:
            return rested.woken(names[candidate], seconds)
        return _Repair(job, names[candidate], candidate, seconds, start)

    def best() -> list[str]:
        rivals = sorted(candidates[1:], key=lambda c: -repair_of(c).closed())
        return [c.id for c in (candidates[0], *rivals[: _TUNED - 1])]

    scarce = seconds is not None and job.trains and len(candidates) > _TUNED
    tuned = job.study.once("fine-tuned", best) if scarce else [c.id for c in candidates]
    out = {}
    for name, candidate in chosen.items():
        start, training = starts[candidate], candidate.id in tuned
        repaired(job, candidate, start, partial(repair_of, candidate), training)
        out[name] = replace(entry_of(job, candidate, start), name=name)
    job.untuned += [name for name, candidate in chosen.items() if candidate.id not in tuned]
    job.resting.clear()  # networks that were not chosen
    return out


def stages_key(candidate: Candidate, start: str = START) -> str:
    """Under which a study records the stages of a repair."""
    return f"{'repair' if start == START else start}/{candidate.id}"


def _only_mended(job: Shrinking, candidate: Candidate) -> bool:
    """Whether a candidate was repaired before without the training that it is to have."""
    before = job.study.recorded().get(stages_key(candidate))
    if before is None or not job.trains or candidate == job.family.original:
        return False
    return all(stage["stage"] != "fine-tuned" for stage in before["stages"])


def mended(job: Shrinking, name: str, candidate: Candidate) -> float:
    """Quality on validation after the closed forms alone, more is better; read once a study. The
    repair rests until the candidate is chosen."""

    def read() -> float:
        one = job.resting[candidate] = _Repair(job, name, candidate, None, START)
        return one.closed()

    return float(job.study.once(f"mended/{candidate.id}", read))


def _share(job: Shrinking, count: int, paid: float, least: float = 0.0) -> float | None:
    left = job.left()
    if left is None:
        return None
    reads = job.reading(count, max(count - _TUNED, 0))
    ready = left - job.last_seconds - min(reads, _READ * max(left, 0.0))
    return max((ready + paid) / min(count, _TUNED), least, _LEAST)


def repaired(
    job: Shrinking, candidate: Candidate, start: str, repair_of: Callable[[], _Repair], tuned: bool
) -> dict[str, Any]:
    """Repairs one candidate and keeps its weights; gives its stages. Done once a study."""
    path = weights_path(job.study.folder, candidate, start)

    def work() -> dict[str, Any]:
        one = repair_of()
        one.run(tuned)
        save_weights(one.best, path)
        for leftover in path.parent.glob(path.stem + ".partial*"):
            leftover.unlink()
        return {"stages": one.stages, "seconds": one.seconds}

    done: dict[str, Any] = job.study.once(stages_key(candidate, start), work)
    return done


class _Repair:
    """One repair: each stage starts from the best before it. It may rest after the closed forms."""

    def __init__(
        self,
        job: Shrinking,
        name: str,
        candidate: Candidate,
        seconds: float | None,
        start: str,
    ) -> None:
        self.job, self.name, self.candidate, self.seconds = job, name, candidate, seconds
        self.path = weights_path(job.study.folder, candidate, start)
        self.started, self.used = time.time(), 0.0
        self.stages: list[dict[str, Any]] = []
        self.best: nn.Module = job.family.build(candidate)
        self.top = -float("inf")

    def woken(self, name: str, seconds: float | None) -> _Repair:
        """The same repair where it goes on; what it took so far is part of its share."""
        self.name, self.seconds = name, seconds
        return self

    def run(self, tuned: bool) -> None:
        """What is left of the repair; `tuned`: with training."""
        self.closed()
        if tuned and self.job.trains and self.candidate != self.job.family.original:
            self.started = time.time() - self.used
            self.stage("fine-tuned", self.fine_tune)

    def closed(self) -> float:
        """Least squares, or statistics set anew where they are not wanted or did not help, once; gives
        the best validation quality, more is better."""
        if not self.stages:
            self.started = time.time()
            self.judge("cut", self.best)
            if self.candidate != self.job.family.original:
                if self.job.repair:
                    self.stage("least squares", self.least_squares)  # statistics are the original's
                if not (self.job.repair and self.stages[-1]["kept"]):
                    self.stage("statistics", self.statistics)
            self.used = time.time() - self.started
        return self.top

    def stage(self, name: str, change: Any) -> None:
        self.job.show.phase(f"{self.name}: {name}", 1)
        network = copy.deepcopy(self.best)
        more = change(network) or {}
        self.judge(name, network, more)

    def judge(self, name: str, network: nn.Module, more: Mapping[str, Any] | None = None) -> None:
        job = self.job
        judged = train.evaluate(network, job.task, "validation")
        sign = 1.0 if job.quality.goal == "max" else -1.0
        value = sign * judged[job.quality.name]
        value = -math.inf if math.isnan(value) else value
        kept = not self.stages or (value >= self.top and value > -math.inf)
        if kept:
            self.best, self.top = network, value
        spent = time.time() - self.started
        row = {"stage": name, "kept": kept, "seconds": round(spent, 2), "metrics": judged}
        self.stages.append({**row, **(more or {})})
        job.show.best(f"{self.name}, {name}: {job.quality.name} {judged[job.quality.name]:.4g}")

    # --- the stages ------------------------------------------------------------------------

    def statistics(self, network: nn.Module) -> None:
        # four batches, of 256 where time is no matter
        repair.recalibrate(network, self.job.task, 4, max(self.job.examples // 2, 2))
        calibrate(network, calibration(self.job.task, 1, self.job.examples, self.job.seed)[0])

    def least_squares(self, network: nn.Module) -> dict[str, Any]:
        """The original's outputs, layer by layer, on examples of train."""
        example = calibration(self.job.task, 1, self.job.examples, self.job.seed)[0]
        done = repair.reconstruct(
            network,
            self.job.family.model,
            example,
            seed=self.job.seed,
            progress=self.job.show.step,
        )
        calibrate(network, example)  # quantised tensors have other ranges now
        return {"output": done["output"], "skipped": done["skipped"]}

    def fine_tune(self, network: nn.Module) -> dict[str, Any]:
        """Distillation from the original in the rest of this network's time."""
        left = None
        if self.seconds is not None:
            left = max(self.seconds - (time.time() - self.started), 0.5 * _LEAST)
        done = repair.finetune(
            network,
            self.job.family.model,
            self.job.task,
            self.job.recipe,
            seconds=left,
            seed=derive(self.job.seed, "repair", self.candidate.id),
            checkpoint=self.path.with_suffix(".partial"),
            progress=self.job.show.step,
        )
        return {"history": done["history"]}


def entry_of(job: Shrinking, candidate: Candidate, start: str = START) -> Entry:
    """The row of a repaired candidate: its latency measured again, its test read once."""
    stages: Sequence[Mapping[str, Any]] = job.study.once(stages_key(candidate, start), dict)[
        "stages"
    ]
    kept = [s for s in stages if s["kept"]][-1]
    name = job.quality.name
    final = job.validated(kept["metrics"])
    cut = stages[0]["metrics"][name]
    final[f"{name}_before"] = Reading(cut, job.quality.unit, "measured", "validation")
    weights = weights_path(job.study.folder, candidate, start)
    network = trained_network(job.family, candidate, weights)
    return whole_entry(job, candidate, network, start, final)
