"""What a shrink could decide on a model, and what it leaves alone: nothing is measured for it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from espalier import tasks
from espalier.compress import Cut
from espalier.flows.decisions import make_cuts
from espalier.flows.given import ModelLike, given_model
from espalier.flows.shrink import pretrained
from espalier.tasks import Task


def explain(
    model: ModelLike,
    task: Task | str,
    *,
    example: Tensor | None = None,
    weights: str | Path | None = None,
    decisions: str | Iterable[str | Cut] = ("width", "depth"),
    seed: int = 0,
) -> list[dict[str, Any]]:
    """A row a decision (decision, kind, layers it changes, options, original), then a row for each
    layer that is left alone (kind, layers, reason).

    Errors: `EspalierError` in one line, as `shrink` gives it.
    """
    task = tasks.make(task) if isinstance(task, str) else task
    module, one = given_model(model, task, weights, example)
    return pretrained(module, one, task, make_cuts(decisions), seed=seed).explain()
