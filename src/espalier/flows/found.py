"""What a search hands out: the best network, the front, the baselines, the files and the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from espalier import report
from espalier.errors import BudgetError, StudyError
from espalier.export import Exported, export
from espalier.flows.finals import non_dominated
from espalier.flows.pricing import Pricing
from espalier.flows.result import result_json
from espalier.flows.weights import trained_network, weights_path
from espalier.nets import Family
from espalier.space import Candidate
from espalier.study import Study, Trial

if TYPE_CHECKING:
    from espalier.flows.finals import Entry
    from espalier.flows.job import Job


@dataclass
class Found:
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

    def to_json(self) -> dict[str, Any]:
        """The whole result as plain JSON: best, front, baselines, budget, seconds, files."""
        return self._result

    def network(self, entry: Entry | None = None) -> nn.Module:
        """The trained plain network of an entry (the best, if none is named)."""
        entry = entry or self.best
        weights = weights_path(self.folder, entry.candidate, entry.start)
        return trained_network(self._job.family, entry.candidate, weights)

    def export(self, folder: str | Path | None = None, entry: Entry | None = None) -> Exported:
        """Writes ONNX, torch.export and safetensors files, each checked against torch."""
        entry = entry or self.best
        task, family = self._job.task, self._job.family
        images, _ = next(iter(task.batches("validation", 16)))
        card = {
            "task": task.name,
            "family": family.name,
            "candidate": entry.candidate.to_json(),
            "metrics": {k: r.to_json() for k, r in entry.metrics.items()},
            # what a user must do to inputs before the network sees them
            "normalisation": getattr(task, "normalisation", {}),
            "class_names": list(getattr(task, "class_names", None) or []),
        }
        return export(
            self.network(entry),
            family.example(),
            Path(folder) if folder is not None else self.folder / "export",
            stem="best",
            inputs=images,
            card=card,
        )

    def report(self) -> Path:
        """Writes the HTML page, Markdown and JSON into the study's folder; gives the page."""
        return report.write(self._result, self.folder)["html"]

    @property
    def family(self) -> Family:
        """The family that was searched, with the trained shared weights if it shares any."""
        return self._job.family

    @property
    def pricing(self) -> Pricing:
        """Prices code arrays of the family: counted costs and predicted latency."""
        return self._job.pricing

    @property
    def quality(self) -> str:
        """Name of the metric that the search made best."""
        return self._job.quality.name

    def publish(self) -> Path:
        """Exports the best network and writes the report; the result lists every file."""
        exported = self.export()
        self._result["files"] = {k: str(v) for k, v in exported.files.items()}
        self._result["differences"] = exported.differences
        return self.report()


def _named(
    entries: Mapping[Candidate, Entry], candidates: Sequence[Candidate], name: str
) -> list[Entry]:
    return [replace(entries[c], name=name) for c in candidates if c in entries]


def _best(job: Job, rows: Sequence[Entry]) -> Entry:
    sign = -1.0 if job.quality.goal == "max" else 1.0
    key = f"{job.quality.name}_validation"
    return min(rows, key=lambda e: (sign * e.metrics[key].value, e.metrics[job.axis].value))
