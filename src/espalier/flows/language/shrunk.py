"""What a shrink of a language model hands out: the model, what it is compared with, the files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from espalier import report
from espalier.flows.finals import ANSWER, Entry, check_kept
from espalier.flows.language.job import LanguageJob
from espalier.flows.language.out import Written, write_model
from espalier.flows.language.repairing import model_of
from espalier.flows.language.result import language_json
from espalier.solvers.allocate import Solution
from espalier.study import Study


@dataclass
class ShrunkLanguage:
    """The answer. `best` keeps every limit; `baselines` had the same limits and the same repair;
    `original` is the model that was given, tested the same way."""

    best: Entry
    baselines: list[Entry]
    original: Entry
    study: Study
    folder: Path
    _job: LanguageJob = field(repr=False)
    _result: dict[str, Any] = field(repr=False, default_factory=dict)

    @classmethod
    def settle(
        cls,
        job: LanguageJob,
        entries: Mapping[str, Entry],
        original: Entry,
        solution: Solution,
        seconds: float,
    ) -> ShrunkLanguage:
        """The answer where it keeps the limits. Errors: `BudgetError` with how far it is."""
        best = entries[ANSWER]
        check_kept(job, best)
        others = [e for name, e in entries.items() if name != ANSWER]
        kept: Sequence[Entry] = [e for e in others if job.keeps(e.metrics)]
        found = cls(best, list(kept), original, job.study, job.study.folder, job)
        left_out = [e.name for e in others if e not in kept]
        found._result = language_json(job, found, solution, left_out, seconds)
        return found

    def network(self, entry: Entry | None = None) -> nn.Module:
        """The repaired model of an entry (the best, if none is named), of transformers' classes."""
        return model_of(self._job, (entry or self.best).candidate)

    def cache(self, entry: Entry | None = None) -> Any:
        """What makes the cache that an entry generates with, for `model.generate(...,
        past_key_values=make())`; None where it is transformers' own."""
        return self._job.family.cache((entry or self.best).candidate)

    @property
    def ignored(self) -> list[dict[str, str]]:
        """What no decision changes, and why."""
        return [
            {"layer": i.layer, "kind": i.kind, "reason": i.reason} for i in self._job.family.ignored
        ]

    def to_json(self) -> dict[str, Any]:
        """The whole result as plain JSON: best, baselines, budget, seconds, files."""
        return self._result

    def export(self, folder: str | Path | None = None) -> Written:
        """Writes the model: a folder that plain `transformers` loads where a configuration can say
        it, else ONNX with cache inputs and outputs and `torch.export`; each is loaded again and
        compared, logits and greedy tokens."""
        return write_model(self._job, self.best.candidate, Path(folder or self.folder))

    def report(self) -> Path:
        """Writes the HTML page, Markdown and JSON into the study's folder; gives the page."""
        return report.write(self._result, self.folder)["html"]

    def publish(self) -> Path:
        """Writes the model and the report; the result lists every file."""
        written = self.export()
        self._result["files"] = {k: str(v) for k, v in written.files.items()}
        self._result["differences"] = written.differences
        self._result["notes"] = [*self._result["notes"], *written.notes]
        self._result["export"] = written.to_json()
        return self.report()
