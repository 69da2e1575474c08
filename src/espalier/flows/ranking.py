"""How well a search's estimates on shared weights ranked its finalists: said, not assumed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from espalier.estimators.rank_check import agreement

if TYPE_CHECKING:
    from espalier.flows.job import Job

_FEWEST = 3  # a rank correlation of two says nothing


def ranking(job: Job) -> dict[str, Any]:
    """Rank correlation of the estimates with validation after training alone, over the finalists.

    Gives `metric`, `n`, `kendall`, `kendall_95` and `spearman`; nothing where no weights were
    shared, or fewer than three finalists have both numbers. Finalists are alike, so this says less
    than `espalier.estimators.rank_check` on candidates from all over the space.
    """
    if not job.shared:
        return {}
    own = f"{job.quality.name}_validation"
    pairs = [
        (job.estimates[t.candidate].value, t.metrics[own].value)
        for t in job.study.trials("final from scratch")
        if t.state == "done" and t.candidate in job.estimates
    ]
    if len(pairs) < _FEWEST:
        return {}
    estimates, truth = np.array(pairs).T
    found = agreement(estimates, truth, job.seed)
    return {"metric": job.quality.name, "n": len(pairs), **found}
