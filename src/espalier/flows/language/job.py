"""A shrink of a language model as a job: what is asked, what is known, what was measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from espalier.compress.language.files.folder import Folder
from espalier.compress.language.repair.refit import Reconstruction
from espalier.flows.finals import Entry
from espalier.flows.language.building import LATE
from espalier.flows.language.harm import LanguageHarm, loss_of
from espalier.flows.language.reproducing import Asked
from espalier.flows.measuring import Measuring
from espalier.flows.pricing import Pricing
from espalier.flows.progress import Display
from espalier.problem import Limit, Reading, SearchBudget
from espalier.solvers.allocate import Factor, Profile, profile
from espalier.space import Candidate, Decision
from espalier.study import Study
from espalier.tasks.tokens import TokenText

_PROFILE = 0.3  # of the whole time
_LEAST_WINDOWS, _MOST_WINDOWS = 4, 128
_MENDING = 0.5  # of the time for an option: what reconstruction may take of it
_MENDED_TOKENS = 4096
_QUICK_WINDOWS = 24
ORIGINAL = "the original"


@dataclass
class LanguageJob(Measuring):
    """Everything a shrink of a language model works with.

    `asked` is the question as it was written, `paid` what an earlier study recorded; `context` is the length at which cache
    and latency are asked for.
    """

    folder: Folder
    family: Any
    task: TokenText
    limits: tuple[Limit, ...]
    context: int
    runtime: Any
    study: Study
    seed: int
    budget: SearchBudget
    show: Display
    measure: str
    asked: Asked
    grouped: bool = False
    paid: Mapping[str, Any] = field(default_factory=dict)
    estimates: dict[Candidate, Reading] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    pricing: Pricing = field(init=False)
    original: Entry = field(init=False)
    harm_of: LanguageHarm = field(init=False)
    bounds: tuple[Limit, ...] = ()  # limits on predicted costs, corrected by measurements
    profile: Profile | None = None
    mended: bool = False
    curve: list[dict[str, Any]] = field(default_factory=list)
    one_shape: dict[str, Any] = field(default_factory=dict)
    times: dict[str, Any] = field(default_factory=dict)  # told where none is limited
    generation: dict[str, Any] = field(default_factory=dict)  # told where the cache is decided on
    phase_started: float = field(default_factory=time.time)

    def once(self, key: str, compute: Callable[[], Any]) -> Any:
        """What this study, or the one that it reuses, recorded under a key; else computed now."""
        return self.study.once(key, lambda: self.paid[key] if key in self.paid else compute())

    def left(self) -> float | None:
        """Seconds until the budget is spent; None without a limit on time."""
        return None if self.budget.seconds is None else self.budget.seconds - self.spent()

    @property
    def options(self) -> int:
        """Options beside the original's, over all decisions."""
        return sum(d.count - 1 for d in self.family.space.decisions)

    # --- the original ------------------------------------------------------------------------

    def read_original(self) -> None:
        """The original's loss on validation and its costs; shares of them become numbers."""
        self.show.phase("reading the original", 1)
        readings = self.price(self.family.original)
        loss = self.once("original validation", lambda: loss_of(self.family.model, self.windows))
        readings |= self.validated(loss)
        self.original = Entry(self.family.original, ORIGINAL, readings, "given")

    def resolve(self) -> None:
        """Turns shares of the original into numbers."""
        metrics = self.original.metrics
        self.limits = tuple(x.resolve(metrics[x.metric].value) for x in self.limits)

    @property
    def windows(self) -> Any:
        """Token ids of validation `(n, context + 1)`."""
        return self.task.windows("validation")

    def validated(self, loss: float) -> dict[str, Reading]:
        """A validation loss as readings, in nats a token and bits a byte."""
        units = {m.name: m.unit for m in self.task.metrics}
        return {
            f"{name}_validation": Reading(value, units[name], "measured", "validation")
            for name, value in self.task.told(loss).items()
        }

    # --- harm --------------------------------------------------------------------------------

    def set_harm(self) -> None:
        """Decides once on how many windows of calibration a candidate is judged, and whether after
        layer-wise reconstruction: where that takes too long, as it was cut."""
        plan = self.once("windows", self._affordable)
        windows = self.task.windows("train", plan["count"])
        mend = self._mend() if plan["mended"] else None
        self.mended = mend is not None
        self.harm_of = LanguageHarm(self.family, windows, self.measure, mend)

    def _mend(self) -> Reconstruction:
        """The last windows of calibration: others than candidates are judged on, where there are."""
        most = max(1, _MENDED_TOKENS // (self.task.context + 1))
        return Reconstruction(self.family.model, self.task.windows("train")[-most:, :-1])

    def _affordable(self) -> dict[str, Any]:
        most = min(self.task.size("train"), _MOST_WINDOWS)
        if self.budget.seconds is None:
            return {"count": most, "mended": True}
        few = self.task.windows("train", min(_LEAST_WINDOWS, most))
        plain = LanguageHarm(self.family, few, self.measure)
        plain.judged(self.family.original)  # the original's logits are computed here
        whole = _PROFILE * self.budget.seconds / max(self.options, 1)
        seconds, more = self._seconds(plain), 0.0
        if mended := seconds < whole:
            mending = LanguageHarm(self.family, few, self.measure, self._mend())
            more = max(self._seconds(mending) - seconds, 0.0)
            mended = more <= _MENDING * whole
        left = whole - (more if mended else 0.0)
        count = int(np.clip(len(few) * left / seconds, len(few), most))
        return {"count": count, "mended": mended}

    def _seconds(self, harm: LanguageHarm) -> float:
        """What an option takes to judge, the mean over all: one of each kind is timed."""
        kinds: dict[str, list[Decision]] = {}
        for decision in self.family.space.decisions:
            kinds.setdefault(decision.name.partition(":")[0], []).append(decision)
        spent = 0.0
        for kind, own in kinds.items():
            first, last = (self._alone(d) for d in (own[0], own[-1]))
            if kind in LATE:
                harm.judged(first)  # the inputs of all places are read here
            spent += _timed(partial(harm.judged, last)) * sum(d.count - 1 for d in own)
        return spent / max(self.options, 1)

    def _alone(self, decision: Decision) -> Candidate:
        """The original but for one decision at its first option, as far as the space's rules allow."""
        space = self.family.space
        code = space.corner(last=True)
        code[0, space.names.index(decision.name)] = 0
        row = space.canonical(code)
        row = row if space.valid(row)[0] else space.corner(last=True)
        found: Candidate = space.decode(row)[0]
        return found

    def sense(self) -> Profile:
        """The harm of every option alone, each recorded."""
        self.show.phase("what every option harms", self.options)
        found = profile(
            self.family,
            self.harm_of.harm,
            record=lambda key, compute: self.once(f"harm/{key}", compute),
            progress=self.show.step,
            measure=self.measure,
            samples=self.harm_of.samples,
        )
        self.profile = found.smoothed(self.family.space)
        return self.profile

    def judged(self, candidate: Candidate) -> dict[str, float]:
        """Harm and calibration loss of a whole candidate, recorded."""
        found: dict[str, float] = self.once(
            f"harm of/{candidate.id}", lambda: _plain(self.harm_of.judged(candidate))
        )
        return {k: float("inf") if v is None else v for k, v in found.items()}

    def validation_of(self, candidate: Candidate) -> float:
        """The loss on a few windows of validation, after layer-wise reconstruction, recorded."""
        windows = self.windows[:_QUICK_WINDOWS]
        judge = LanguageHarm(self.family, windows, "loss", self.harm_of.mend)
        found = self.once(f"quick/{candidate.id}", lambda: _plain(judge.judged(candidate)))
        return float("inf") if found["loss"] is None else float(found["loss"])

    # --- costs -------------------------------------------------------------------------------

    def factors(self, metrics: Sequence[str]) -> dict[str, list[Factor]]:
        """Costs as factors for the exact program."""
        out = {}
        for metric in metrics:
            (cost,) = [c for c in self.pricing.costs if metric in {m.name for m in c.metrics}]
            tables: Any = cost
            out[metric] = [
                Factor(t.decisions, t.values, name=t.name) for t in tables.tables(metric)
            ]
        return out


def _timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return max(time.perf_counter() - started, 1e-6)


def _plain(found: Mapping[str, float]) -> dict[str, float | None]:
    """Strict JSON knows no infinity."""
    return {k: v if np.isfinite(v) else None for k, v in found.items()}
