"""A shrink as a job: the original measured, costs in tables, the harm of every option."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from espalier import train
from espalier.compress import Cut, Pretrained, Widths
from espalier.compress.sparsity import StoredBytes
from espalier.compress.widths import PREFIX
from espalier.costs import CodeCost, Counts, OnnxRuntime, PredictedLatency
from espalier.costs.runtime import BusyMachine
from espalier.costs.side_by_side import Ratio, ratio
from espalier.errors import EspalierError
from espalier.estimators.calibration import Calibrated, Measure
from espalier.export import to_onnx
from espalier.flows.finals import Entry
from espalier.flows.importances import MOST_IMAGES, asked_for, importances
from espalier.flows.measuring import Measuring
from espalier.flows.pricing import Pricing
from espalier.flows.progress import Display
from espalier.problem import Limit, Reading, SearchBudget, tightest
from espalier.solvers.allocate import Profile, profile
from espalier.space import Candidate
from espalier.study import Study
from espalier.tasks import Task
from espalier.train import Recipe

LATENCY, STORED = "latency_ms", "stored_bytes"
# Shares of the whole time; repair has what is left.
_TABLE, _PROFILE = 0.25, 0.25
_MATTER, _TRAINED = 0.08, 4.5  # for importances; with gradients a pass takes so many without
_CLOSED_SHARE, _CLOSED_PASSES = 0.08, 8.0  # for the closed forms of one network
_MOST_CLOSED = 512  # examples of least squares and statistics
_LEAST_IMAGES, _MOST_IMAGES = 16, 1024  # the least that tell something, where time is short
_SENSED = 1.2 * _PROFILE  # of the time: then options between others are not measured
_SURVEYED = 0.8 * _PROFILE  # of the time: then the furthest ones are not either
# Export and report, after everything else: seconds, and times what a trace of the original takes.
_WRITING, _WRITTEN = 4.0, 15.0
_CUT = (
    0.5  # what a pass takes of the original's: it is of a smaller network, and the first was cold
)
_CLOSED = 3  # passes over validation that closed forms take
_REPAIR = 0.2  # of the time is left for fine-tuning, or a baseline is left out
_ORIGINAL_TIMES = 3
_UNSURE = 0.05  # spread of a ratio, as a share of it, that makes it one of a busy machine


@dataclass
class Shrinking(Measuring):
    """Everything a shrink works with. `paid` reads what an earlier study of the same recorded."""

    family: Pretrained
    task: Task
    limits: tuple[Limit, ...]
    runtime: OnnxRuntime
    study: Study
    seed: int
    budget: SearchBudget
    show: Display
    repair: bool
    recipe: Recipe | None
    measure: Measure
    paid: Mapping[str, Any] = field(default_factory=dict)
    estimates: dict[Candidate, Reading] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    slower: dict[Candidate, float] = field(default_factory=dict)
    pricing: Pricing = field(init=False)
    predicted: PredictedLatency | None = None
    original: Entry = field(init=False)
    calibrated: Calibrated = field(init=False)
    profile: Profile | None = None
    phase_started: float = field(default_factory=time.time)
    solver: str = "auto"
    baselines: bool = True
    tune: bool = True
    cuts: Sequence[Cut] = ()
    asked: tuple[Limit, ...] = field(init=False)  # with shares as shares
    beside: bool = field(init=False)
    untuned: list[str] = field(default_factory=list)  # baselines that had no fine-tuning
    greedy: dict[Candidate, tuple[float, float]] = field(default_factory=dict)
    resting: dict[Candidate, Any] = field(default_factory=dict)  # repairs after their closed forms

    def __post_init__(self) -> None:
        self.asked = self.limits
        # a share of the original's latency is timed beside the original
        self.beside = any(x.metric == LATENCY and x.relative for x in self.limits)

    def once(self, key: str, compute: Callable[[], Any]) -> Any:
        """What this study, or the one that it reuses, recorded under a key; else computed now."""
        return self.study.once(key, lambda: self.paid[key] if key in self.paid else compute())

    def chosen(self, key: str, choose: Callable[[], dict[str, Candidate]]) -> dict[str, Candidate]:
        """Name to the candidate that was chosen, once a study, and the rounds that led there: when it
        is resumed less time is left, which would end in another choice."""

        def work() -> dict[str, Any]:
            before, wanted = len(self.rounds), choose()
            return {
                "wanted": {name: c.to_json() for name, c in wanted.items()},
                "rounds": self.rounds[before:],
                "greedy": [[c.to_json(), *map(str, harms)] for c, harms in self.greedy.items()],
            }

        rounds = list(self.rounds)
        done = self.study.once(key, work)
        self.rounds[:] = rounds + done["rounds"]
        for candidate, ours, theirs in done["greedy"]:
            self.greedy[Candidate.from_json(candidate)] = float(ours), float(theirs)
        return {name: Candidate.from_json(c) for name, c in done["wanted"].items()}

    def left(self) -> float | None:
        """Seconds until the budget is spent; None without a limit on time."""
        return None if self.budget.seconds is None else self.budget.seconds - self.spent()

    def reading(self, networks: int, closed: int) -> float:
        """Seconds of what only reads: the test of the original and of so many smaller networks, and
        the closed forms of so many of them."""
        test = self.task.size("test") / max(self.task.size("validation"), 1)
        return self.validation_seconds * (test + _CUT * (networks * test + closed * _CLOSED))

    @property
    def deciding(self) -> float | None:
        """Seconds of the budget that everything before the repair has shares of: what reading and
        writing leave, half of it at least. None without a limit on time."""
        if self.budget.seconds is None:
            return None
        left = self.budget.seconds - self.last_seconds - self.reading(1, 1)
        return max(left, 0.5 * self.budget.seconds)

    def affords(self, networks: int) -> bool:
        """Whether the time that is left is enough to read so many networks and to train."""
        left = self.left()
        if left is None or self.budget.seconds is None:
            return True
        training = _REPAIR * self.budget.seconds if self.trains else 0.0
        return left - self.last_seconds - self.reading(networks, networks) > training

    @property
    def trains(self) -> bool:
        """Whether what was cut is also trained."""
        return self.repair and self.tune

    @property
    def latency_limit(self) -> Limit | None:
        """The limit that needs a runtime."""
        return next((x for x in self.limits if x.metric == LATENCY and x.op == "<="), None)

    @cached_property
    def examples(self) -> int:
        """On how many images of train closed forms repair a network."""
        share, passes = _CLOSED_SHARE, _CLOSED_PASSES
        return int(
            self.study.once("closed images", lambda: self.affordable(share, passes, _MOST_CLOSED))
        )

    # --- phases ----------------------------------------------------------------------------

    def read_original(self) -> None:
        """Measures the original, decides in which order channels go, and turns shares into numbers."""
        self.show.phase("measuring the original", _ORIGINAL_TIMES)
        candidate = self.family.original
        judged = self._judged()
        if asked_for(self.cuts):
            self.family = self.family.with_scores(self.importances)
        self.pricing = Pricing(self.family.space, self._counted())
        readings = self.price(candidate)

        def measure() -> dict[str, Any]:
            times = []
            for i in range(_ORIGINAL_TIMES):
                times.append(self.measured(candidate, None, f"latency-original-{i}"))
                self.show.step(i + 1, _ORIGINAL_TIMES)
            return sorted(times, key=lambda r: r.value)[len(times) // 2].to_json()

        latency = self.once("original latency", measure)
        readings[LATENCY] = Reading.from_json(latency)
        readings.update(self.validated(judged))
        self.original = Entry(candidate, "the original", readings)
        self.limits = tightest([x.resolve(readings[x.metric].value) for x in self.limits])

    def _judged(self) -> dict[str, float]:
        """What the original is worth on validation, and how long it takes to tell."""
        began = time.perf_counter()
        judged: dict[str, float] = self.once(
            "original validation",
            lambda: train.evaluate(self.family.model, self.task, "validation"),
        )
        passed = time.perf_counter() - began
        self.validation_seconds = float(self.once("original validation seconds", lambda: passed))
        if not math.isfinite(judged[self.quality.name]):
            raise EspalierError(
                f"the given model's {self.quality.name} on validation is {judged[self.quality.name]}: "
                "there is nothing to keep"
            )
        return judged

    @cached_property
    def importances(self) -> dict[str, Tensor]:
        """Of every channel, by group; on fewer images where time is short."""
        most = min(MOST_IMAGES, self.task.size("train"))
        # what an earlier study measured may be from before it told how many it had read: of most
        known = any(key.startswith("harm/") for key in self.paid)
        images = self.once(
            "images of importances",
            lambda: most if known else self.affordable(_MATTER, _TRAINED, most),
        )
        return importances(self.family, self.cuts, self.task, self.seed, images)

    def affordable(self, share: float, passes: float, most: int) -> int:
        """On how many images so many passes of the original take this share of the time."""
        if self.deciding is None:
            return most
        one = passes * self.validation_seconds / max(self.task.size("validation"), 1)
        return int(np.clip(share * self.deciding / max(one, 1e-9), min(_LEAST_IMAGES, most), most))

    def _counted(self) -> list[CodeCost]:
        """The exact costs; bytes without zeros are counted where they are limited."""
        stored = any(x.metric == STORED for x in self.limits)
        return [Counts(self.family), *([StoredBytes(self.family)] if stored else [])]

    @cached_property
    def given(self) -> tuple[bytes, Tensor]:
        """The original as ONNX, and an example of the runtime's batch."""
        x = self.runtime.batched(self.family.example())
        times, made = [], b""
        for _ in range(2):  # the first of a process takes longer
            began = time.perf_counter()
            made = to_onnx(self.family.model.eval(), x, fast=True)
            times.append(time.perf_counter() - began)
        self.study.once("trace seconds", lambda: min(times))
        return made, x

    @cached_property
    def last_seconds(self) -> float:
        """Seconds that export and report take."""
        if "trace seconds" not in self.study.recorded():
            _ = self.given
        return _WRITING + _WRITTEN * float(self.study.recorded()["trace seconds"])

    def measured(self, candidate: Candidate, network: nn.Module | None, key: str) -> Reading:
        """The latency on the real runtime, measured once a study and key, then read.

        Where the limit is a share of the original's, both are timed in turns, and the answer is
        that share of what the original took: machines do not keep their pace for a whole shrink.
        """
        if not self.beside or not hasattr(self, "original"):
            return super().measured(candidate, network, key)
        original = self.original.metrics[LATENCY].value

        def measure() -> dict[str, Any]:
            built = self.family.build(candidate) if network is None else network
            found = self._share(to_onnx(built.eval(), self.given[1], fast=True))
            return {
                "value": found.value * original,
                "spread": found.spread * original,
                "share": found.value,
                "runs": found.rounds,
                "busy": found.spread > _UNSURE * found.value,
            }

        got = self.study.once(f"{key}/{candidate.id}", measure)
        return Reading(got["value"], "ms", "measured", "", got["spread"])

    def file_latency(self, path: Path) -> float:
        """The same of an ONNX file, now."""
        if not self.beside:
            return super().file_latency(path)
        return self._share(path).value * self.original.metrics[LATENCY].value

    def _share(self, model: bytes | Path) -> Ratio:
        """Of the original's latency, timed in turns with it."""
        given, x = self.given
        found = ratio(self.runtime, model, given, x)
        if self.runtime.strict and found.spread > _UNSURE * found.value:
            raise BusyMachine(
                f"the machine is too busy to measure: {found.rounds} timings beside the original are "
                f"apart by {found.spread / found.value:.0%}; stop other work and measure again, or "
                "allow it with strict=False"
            )
        return found

    def validated(self, judged: Mapping[str, float]) -> dict[str, Reading]:
        """Validation metrics as readings, named `<metric>_validation`."""
        units = {m.name: m.unit for m in self.task.metrics}
        return {
            f"{name}_validation": Reading(value, units.get(name, ""), "measured", "validation")
            for name, value in judged.items()
        }

    def calibrate(self) -> None:
        """Measures the table of latencies, where a limit needs it."""
        if not any(x.metric == LATENCY for x in self.limits):
            return
        fresh = PredictedLatency(self.family, self.runtime)
        seconds = math.inf if self.deciding is None else _TABLE * self.deciding
        self.show.phase("calibrating latency on this machine", 1)
        table = self.once(
            "latency table",
            lambda: fresh.calibrate(seed=self.seed, progress=self.show.step, seconds=seconds),
        )
        self.predicted = PredictedLatency.from_json(self.family, self.runtime, table)
        self.pricing = Pricing(self.family.space, [*self._counted(), self.predicted])

    def set_estimator(self) -> None:
        """Decides once on how many training images a candidate is judged, from timed passes."""
        self.calibrated = self.judging(self.once("images", self._images))

    def judging(self, images: int) -> Calibrated:
        """What tells harm on so many training images."""
        return Calibrated(
            self.family,
            self.task,
            measure=self.measure,
            images=images,
            seed=self.seed,
            threads=torch.get_num_threads(),
        )

    def _images(self) -> int:
        most = min(_MOST_IMAGES, self.task.size("train"))
        if self.deciding is None:
            return min(512, most)
        share = _PROFILE / max(self.options, 1)
        if self.affordable(share, 1.0, most) <= _LEAST_IMAGES:  # a pass of it tells enough
            return min(_LEAST_IMAGES, most)
        trial = self.judging(_LEAST_IMAGES)
        trial.harm([self.smallest()])  # reads the data
        started = time.perf_counter()
        trial.harm([self.family.original])
        seconds = time.perf_counter() - started
        affordable = share * self.deciding
        return int(np.clip(_LEAST_IMAGES * affordable / seconds, min(_LEAST_IMAGES, most), most))

    @property
    def options(self) -> int:
        """Options beside the original's, over all decisions."""
        return sum(d.count - 1 for d in self.family.space.decisions)

    def sense(self) -> Profile:
        """The harm of every option alone, each recorded."""
        self.show.phase("what every option harms", self.options)
        # what this phase did before, costs looked up among it, is part of its share
        began = self.phase_started - self.study.phase_seconds().get("sensitivity", 0.0)

        def late(key: str, name: str, share: float) -> bool:
            # of widths alone: fewer bits and other patterns of zeros do not harm by the square of the way
            if self.deciding is None or not name.startswith(PREFIX):
                return False
            spent = time.time() - began > share * self.deciding
            return bool(self.once(f"{key}/{name}", lambda: spent))

        def none_measured(name: str) -> bool:
            if found := late("guessed", name, _SURVEYED):
                guessed.append(name)
            return found

        guessed: list[str] = []
        found = profile(
            self.family,
            self.calibrated.harm,
            record=lambda key, compute: self.once(f"harm/{key}", compute),
            progress=self.show.step,
            measure=self.measure,
            samples=self.calibrated.samples,
            hurried=lambda name: late("hurried", name, 0.0 if guessed else _SENSED),
            late=none_measured,
            guess=self._guesses() if self.deciding is not None else {},
        )
        if found.drawn or found.guessed:
            self.study.notes.append(self._unmeasured(found))
        # more of a layer that harms more is noise of few images
        self.profile = found.smoothed(self.family.space)
        return self.profile

    def _guesses(self) -> dict[str, float]:
        """What the furthest option of a width harms, in units of its own: the importance of all that
        goes (`benchmarks/harm_guess.py` holds it against what was measured). Of Taylor's alone: sums of
        other scores do not compare across layers."""
        widths = [cut for cut in self.cuts if isinstance(cut, Widths)]
        if not all(cut.scores is None and cut.importance == "taylor" for cut in widths):
            return {}
        furthest = {d.name: d.options[0] for d in self.family.space.decisions}
        found = {}
        for name, scores in self.importances.items():
            if isinstance(kept := furthest.get(PREFIX + name), int):
                found[PREFIX + name] = float(scores.sort().values[: len(scores) - kept].sum())
        return found

    def _unmeasured(self, found: Profile) -> str:
        few, none = len(found.drawn), len(found.guessed)
        told = f" and of {none} none (its importance told)" if none else ""
        return (
            f"for want of time, of {few} of {len(self.family.space)} decisions only the furthest option's harm "
            f"was measured{told}, and the others drawn between: a longer budget that reuses nothing measures all"
        )

    def harm(self, candidates: Sequence[Candidate]) -> list[float]:
        """The harm of whole candidates, each recorded."""

        def one(candidate: Candidate) -> float:
            key = f"harm of/{candidate.id}"
            found = self.once(key, lambda: float(self.calibrated.harm([candidate])[0]))
            return float(found)

        return [one(candidate) for candidate in candidates]
