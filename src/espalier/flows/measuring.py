"""What every job does with candidates: prices them, measures them once, judges their limits."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from espalier.costs import OnnxRuntime
from espalier.errors import StudyError
from espalier.flows.machine import timed_on
from espalier.flows.pricing import Pricing
from espalier.flows.progress import Display
from espalier.nets import Family
from espalier.problem import Limit, Metric, Reading, SearchBudget
from espalier.space import Candidate, Space
from espalier.study import Study
from espalier.tasks import Task

_MACHINE = "timed on"  # the event that says what a study runs on from there


class Measuring:
    """The part that the jobs share. What is measured is recorded in the study, once a key."""

    family: Family
    task: Task
    limits: tuple[Limit, ...]
    runtime: OnnxRuntime
    study: Study
    seed: int
    budget: SearchBudget
    show: Display
    pricing: Pricing
    estimates: Mapping[Candidate, Reading]
    phase_started: float

    # --- what is asked ---------------------------------------------------------------------

    @property
    def quality(self) -> Metric:
        """What is made best."""
        return self.task.metrics[0]

    @property
    def axis(self) -> str:
        """The cost that spans the front: the first that is limited, else latency."""
        return self.limits[0].metric if self.limits else "latency_ms"

    def smallest(self) -> Candidate:
        """Every first option, as far as the space's rules allow."""
        space = self.family.space
        row = space.repair(space.corner(last=False), np.random.default_rng(self.seed))
        found: Candidate = space.decode(row)[0]
        return found

    # --- numbers ---------------------------------------------------------------------------

    def price(self, candidate: Candidate) -> dict[str, Reading]:
        """Every counted or predicted cost of one candidate."""
        return self.pricing(self.family.space.encode([candidate])).readings()[0]

    def measured(self, candidate: Candidate, network: nn.Module | None, key: str) -> Reading:
        """The latency on the real runtime, measured once a study and key, then read."""

        def measure() -> dict[str, Any]:
            built = self.family.build(candidate) if network is None else network
            timing = self.runtime.measure(built.eval(), self.family.example(self.runtime.batch))
            return {
                "value": timing.median_ms,
                "spread": timing.spread * timing.median_ms,
                "p90": timing.p90_ms,
                "runs": timing.runs,
                "busy": timing.busy,
            }

        got = self.study.once(f"{key}/{candidate.id}", measure)
        return Reading(got["value"], "ms", "measured", "", got["spread"])

    def file_latency(self, path: Path) -> float:
        """Milliseconds of an ONNX file on the real runtime, measured now."""
        return self.runtime.quick(path, self.runtime.batched(self.family.example())).median_ms

    def settled(self, candidate: Candidate, network: nn.Module) -> Reading:
        """The trained network's latency; where it lands over the limit and the first measurement
        did not, the median of four decides."""
        reading = self.measured(candidate, network, "latency-trained")
        price = self.price(candidate)
        if self.keeps({**price, "latency_ms": reading}):
            return reading
        again = [self.measured(candidate, network, f"latency-trained-{i}") for i in range(2)]
        all_four = sorted(
            [self.measured(candidate, None, "latency"), reading, *again], key=lambda r: r.value
        )
        middle = all_four[1:3]
        value = sum(r.value for r in middle) / 2
        return replace(reading, value=value, spread=all_four[-1].value - all_four[0].value)

    def busy(self, candidate: Candidate) -> bool:
        """Whether other work disturbed the measurement of the trained network."""
        return bool(self.study.once(f"latency-trained/{candidate.id}", dict).get("busy"))

    def keeps(self, readings: Mapping[str, Reading], margin: float = 1.0) -> bool:
        """Whether the readings keep every limit; measured latency within `margin` of its own."""
        for limit in self.limits:
            bound = limit.bound
            if readings[limit.metric].how == "measured" and limit.op == "<=":
                bound *= margin
            if replace(limit, bound=bound).violation([readings[limit.metric].value])[0] > 0:
                return False
        return True

    # --- time ------------------------------------------------------------------------------

    def spent(self) -> float:
        """Seconds that this study took so far, over all its runs."""
        return sum(self.study.phase_seconds().values()) + time.time() - self.phase_started

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times a phase; the seconds of all runs of a study are added up."""
        self.phase_started = time.time()
        try:
            yield
        finally:
            self.study.event("phase", name=name, seconds=time.time() - self.phase_started)
            self.phase_started = time.time()


def how_many(space: Space) -> float:
    """The candidates of a space, as far as floats go."""
    return float(min(space.size, sys.float_info.max))


# --- a study's folder and identity ---------------------------------------------------------------


def plain_runtime(runtime: OnnxRuntime) -> dict[str, Any]:
    """The runtime's settings as JSON: part of what a study is about."""
    return {k: v for k, v in asdict(runtime).items() if isinstance(v, (str, int, float, bool))}


def begun(
    folder: Path, identity: Mapping[str, Any], settings: Mapping[str, Any], seed: int, resume: bool
) -> Study:
    """A new study, or one that goes on: it then notes what it was begun on, if that was another."""
    here = timed_on()
    if resume:
        study = Study.resume(folder, identity)
        others = [each for each in _machines(study) if not _alike(each, here)]
        if others:
            study.notes.append(
                f"begun on another machine or runtime ({', '.join(others[0].values())}; this is "
                f"{', '.join(here.values())}): what was timed there is not timed again"
            )
    else:
        study = Study.create(folder, identity, settings, seed)
    study.event(_MACHINE, on=here)
    return study


def timed_here(study: Study) -> bool:
    """Whether all timings of a study are of this machine and these runtimes."""
    seen = _machines(study)
    return bool(seen) and all(_alike(each, timed_on()) for each in seen)


def _alike(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether two machines are the same as far as both are told."""
    return all(one[key] == other[key] for key in one.keys() & other.keys())


def _machines(study: Study) -> list[dict[str, str]]:
    return [event["on"] for event in study.events() if event["kind"] == _MACHINE]


def study_folder(out: str | Path | None, stem: str, resume: bool) -> Path:
    """The folder of a study: `out`, or one under `runs/` that is not there yet.

    Errors: `StudyError` where a study is to go on and no folder is given.
    """
    if out is not None:
        return Path(out)
    if resume:
        raise StudyError("a study that goes on has a folder: give it as out (--out DIR)")
    return next(p for i in itertools.count(1) if not (p := Path("runs") / f"{stem}-{i}").exists())


def withdraw(folder: Path) -> None:
    """Removes the ledger of a study that was refused before its first trial, so that the same
    command with a mended limit can use the folder."""
    with Study.open(folder) as study:
        if study.trials():
            return
    for path in folder.glob("ledger.*"):
        path.unlink()
