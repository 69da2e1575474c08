"""What a search hands out: the best network, the front, the baselines, the files and the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier.errors import BudgetError, StudyError
from espalier.flows.answer import Answer
from espalier.flows.finals import non_dominated
from espalier.flows.result import result_json
from espalier.space import Candidate
from espalier.study import Study, Trial

if TYPE_CHECKING:
    from espalier.flows.finals import Entry
    from espalier.flows.job import Job


@dataclass
class Found(Answer):
    """The answer of a search. `best` keeps every limit as measured; `front` has what is cheaper;
    `baselines` are the family scaled by hand and the best of random search."""

    best: Entry
    front: list[Entry]
    baselines: list[Entry]
    study: Study
    folder: Path
    _job: Job = field(repr=False)
    _result: dict[str, Any] = field(repr=False, default_factory=dict)

    @classmethod
    def settle(
        cls,
        job: Job,
        chosen: Mapping[str, Sequence[Candidate]],
        entries: Mapping[Candidate, Entry],
        trials: Sequence[Trial],
        seconds: float,
    ) -> Found:
        """Chooses by validation among those that keep the limits as measured; writes everything."""
        own = _named(entries, chosen["search"], "found") + _named(
            entries, chosen["cheaper"], "found"
        )
        if not own:
            raise StudyError(
                "no network that was found could be trained to the end; "
                f"the tracebacks stand in the ledger of {job.study.folder}"
            )
        kept = [e for e in own if job.keeps(e.metrics)]
        if not kept:
            closest = min(own, key=lambda e: e.metrics["latency_ms"].value)
            raise BudgetError(
                f"no trained network keeps {', '.join(map(str, job.limits))} as measured: the "
                f"closest takes {closest.metrics['latency_ms'].value:.4g} ms; raise the limit a little"
            )
        best = _best(job, kept)
        baselines = []
        for role, name in (("hand", "scaled by hand"), ("random", "random search")):
            rows = [e for e in _named(entries, chosen[role], name) if job.keeps(e.metrics)]
            if rows:
                baselines.append(_best(job, rows))
        front = non_dominated(job, kept)
        found = cls(best, front, baselines, job.study, job.study.folder, job)
        found._result = result_json(job, found, trials, seconds)
        return found


def _named(
    entries: Mapping[Candidate, Entry], candidates: Sequence[Candidate], name: str
) -> list[Entry]:
    return [replace(entries[c], name=name) for c in candidates if c in entries]


def _best(job: Job, rows: Sequence[Entry]) -> Entry:
    sign = -1.0 if job.quality.goal == "max" else 1.0
    key = f"{job.quality.name}_validation"
    return min(rows, key=lambda e: (sign * e.metrics[key].value, e.metrics[job.axis].value))
