"""What a shrink hands out: the best model within the budget, what it is compared with, the files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from espalier import train
from espalier.flows.answer import Answer
from espalier.flows.finals import ANSWER, check_kept
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

        Errors: `BudgetError` with how far the answer is.
        """
        answer = entries[ANSWER]
        check_kept(job, answer)
        rivals = [e for name, e in entries.items() if name != ANSWER]
        kept = [e for e in rivals if job.keeps(e.metrics)]
        best, others = best_of(job, answer, kept, solver[0])
        if best is not answer:
            job.show.note(f"{best.name} is better on validation: it is handed out")
        found = cls(best, others, _tested(job), job.study, job.study.folder, job)
        left_out = [e.name for e in rivals if e not in kept]
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


def best_of(
    job: Shrinking, answer: Entry, rivals: Sequence[Entry], solver: str
) -> tuple[Entry, list[Entry]]:
    """The best on validation, the answer of equals; and the others."""
    sign = 1.0 if job.quality.goal == "max" else -1.0
    name = f"{job.quality.name}_validation"
    best = max([answer, *rivals], key=lambda entry: sign * entry.metrics[name].value)
    named = replace(answer, name=f"the answer of {solver}")
    return best, [named if e is best else e for e in rivals]


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
