"""What a shrink hands out: the best model within the budget, what it is compared with, the files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from espalier import train
from espalier.flows.answer import Answer
from espalier.flows.finals import ANSWER, check_kept, named
from espalier.flows.shrunk_result import shrunk_json
from espalier.problem import Reading
from espalier.study import Study

if TYPE_CHECKING:
    from espalier.flows.finals import Entry
    from espalier.flows.shrinking import Shrinking


@dataclass
class Shrunk(Answer):
    """The answer of a shrink. `best` keeps every limit as measured; `baselines` had the same
    repair; `original` is the model that was given, measured and tested the same way."""

    best: Entry
    baselines: list[Entry]
    original: Entry
    study: Study
    folder: Path
    _job: Shrinking = field(repr=False)
    _result: dict[str, Any] = field(repr=False, default_factory=dict)

    @classmethod
    def settle(
        cls,
        job: Shrinking,
        entries: Mapping[str, Entry],
        solver: tuple[str, str],
        seconds: float,
    ) -> Shrunk:
        """The answer where it keeps the limits as measured, or a rival that keeps them too and is
        better on validation; writes everything.

        Errors: `BudgetError` with how far the answer is, where no rival keeps them either.
        """
        kept = {name: e for name, e in entries.items() if job.keeps(e.metrics)}
        if not kept:
            check_kept(job, entries[ANSWER])
        best, *others = best_first(job, kept, solver[0])
        if best.name != ANSWER:
            job.show.note(f"{best.name} is better on validation: it is handed out")
        found = cls(best, others, _tested(job), job.study, job.study.folder, job)
        left_out = [named(n, solver[0]) for n in entries if n not in kept]
        found._result = shrunk_json(job, found, solver, left_out, seconds)
        return found

    def network(self, entry: Entry | None = None) -> nn.Module:
        """The repaired plain model of an entry (the best, if none is named)."""
        if entry is not None and entry.start == "given":
            return self._job.family.build(entry.candidate).eval()
        return super().network(entry)

    @property
    def ignored(self) -> list[dict[str, str]]:
        """The layers that no decision changes, and why."""
        return [
            {"layer": i.layer, "kind": i.kind, "reason": i.reason} for i in self._job.family.ignored
        ]


def best_first(job: Shrinking, kept: Mapping[str, Entry], solver: str) -> list[Entry]:
    """The best on validation, the answer of equals; then the others as they come."""
    sign = 1.0 if job.quality.goal == "max" else -1.0
    metric = f"{job.quality.name}_validation"

    def rank(entry: Entry) -> tuple[float, bool]:
        value = sign * entry.metrics[metric].value
        return -math.inf if math.isnan(value) else value, entry.name == ANSWER

    best = max(kept.values(), key=rank)
    others = [e for e in kept.values() if e is not best]
    return [best, *(replace(e, name=named(e.name, solver)) for e in others)]


def _tested(job: Shrinking) -> Entry:
    """The original, tested once."""
    tested = job.study.once(
        "test/original", lambda: train.evaluate(job.family.model, job.task, "test")
    )
    metrics = dict(job.original.metrics)
    for metric in job.task.metrics:
        if metric.name in tested:
            metrics[metric.name] = Reading(tested[metric.name], metric.unit, "measured", "test")
    return replace(job.original, metrics=metrics, start="given")
