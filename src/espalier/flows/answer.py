"""What every job hands out: the best network, its files and its report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from espalier import report
from espalier.export import Exported, export
from espalier.flows.finals import Entry
from espalier.flows.measuring import Measuring
from espalier.flows.pricing import Pricing
from espalier.flows.weights import trained_network, weights_path
from espalier.nets import Family


class Answer:
    """The part that the answers of all jobs share."""

    best: Entry
    folder: Path
    _job: Measuring
    _result: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The whole result as plain JSON: best, baselines, budget, seconds, files."""
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

    def publish(self) -> Path:
        """Exports the best network and writes the report; the result lists every file."""
        exported = self.export()
        self._result["files"] = {k: str(v) for k, v in exported.files.items()}
        self._result["differences"] = exported.differences
        return self.report()

    @property
    def family(self) -> Family:
        """The family, with the weights that candidates start from if it has any."""
        return self._job.family

    @property
    def pricing(self) -> Pricing:
        """Prices code arrays of the family: counted costs and predicted latency."""
        return self._job.pricing

    @property
    def quality(self) -> str:
        """Name of the metric that was made best."""
        return self._job.quality.name
