"""What every job hands out: the best network, its files and its report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import median
from typing import Any

from torch import nn

from espalier import report
from espalier.errors import EspalierError, ExportError
from espalier.export import Exported, export
from espalier.flows.finals import Entry
from espalier.flows.measuring import Measuring
from espalier.flows.pricing import Pricing
from espalier.flows.weights import trained_network, weights_path
from espalier.nets import Family

_LOOKS = 3  # at a file that seems over the limit
_WRITTEN = "timed as written"  # in the note on it


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
            "metrics": {k: r.to_json() for k, r in entry.metrics.items() if math.isfinite(r.value)},
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
        """Exports the best network and writes the report; the result lists every file.

        Errors: `ExportError` where the network can't be exported; the report is there nevertheless.
        """
        try:
            exported = self.export()
        except ExportError as error:
            self._result["notes"] = [*self._result["notes"], f"Not exported: {error}"]
            error.args = (f"{error}; the report is {self.report()}, the weights lie beside it",)
            raise
        self._result["files"] = {k: str(v) for k, v in exported.files.items()}
        self._result["differences"] = exported.differences
        notes = [n for n in self._result["notes"] if _WRITTEN not in n]  # of an earlier call
        self._result["notes"] = [*notes, *self._timed(exported)]
        return self.report()

    def _timed(self, exported: Exported) -> list[str]:
        """Whether the ONNX file keeps a limit on latency too: what was measured until then was a
        trace of the network, which is written faster and by another exporter."""
        job, path = self._job, exported.files.get("onnx")
        limit = next((x for x in job.limits if x.metric == "latency_ms"), None)
        if limit is None or path is None:
            return []
        dynamic = json.loads(exported.files["card"].read_text())["dynamic_batch"]
        if job.runtime.batch > 1 and not dynamic:
            return []
        self._result.pop("file_latency_ms", None)  # of an earlier call
        try:
            ms = job.file_latency(path)
            if limit.violation([ms])[0] > 0:
                ms = median([ms, *(job.file_latency(path) for _ in range(_LOOKS - 1))])
        except EspalierError as error:
            return [f"{path.name}, {_WRITTEN}: {error}"]
        word = "over" if limit.violation([ms])[0] > 0 else "within"
        self._result["file_latency_ms"] = ms
        return [f"{path.name}, {_WRITTEN}: {ms:.4g} ms, {word} the limit of {limit.bound:.4g} ms."]

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
