"""What it costs that all layers keep one shape: the same decisions, each layer for itself."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from espalier.compress import Cut
from espalier.compress.language.cache.cuts import held
from espalier.compress.language.family import Language
from espalier.costs.language import LanguageCounts
from espalier.costs.language_times import TIMES
from espalier.errors import EspalierError
from espalier.flows.language.job import LanguageJob
from espalier.flows.language.solving import solved
from espalier.flows.pricing import Pricing
from espalier.space import Candidate

_SHARE = 0.25  # of the whole time


def price_of_one_shape(
    job: LanguageJob, cuts: Sequence[Cut], stored: int, first: Candidate
) -> dict[str, Any]:
    """Calibration loss of the program's answer with one shape for all layers, and with layers free,
    within the same limits on counted costs; recorded. Only "why" where that can't be told."""

    def compare() -> dict[str, Any]:
        free = _apart(job, cuts, stored)
        each = 0.0 if job.profile is None else job.profile.seconds / max(job.options, 1)
        if job.budget.seconds is not None and each * free.options > _SHARE * job.budget.seconds:
            return _untold(
                job,
                f"the harm of {free.options} options of layers apart takes about "
                f"{each * free.options:.0f} s, more than {_SHARE:.0%} of the budget",
            )
        limits = [x for x in job.limits if x.metric not in TIMES]
        if not limits:
            return _untold(job, "only times are limited, which are not predicted for layers apart")
        free.show.phase("the same with layers apart", free.options)
        free.sense()
        try:
            answer = solved(free, limits).candidate
        except EspalierError as error:
            return _untold(job, f"with layers apart: {error}")
        return {"one shape": job.judged(first), "layers apart": free.judged(answer)}

    found: dict[str, Any] = job.study.once("one shape", compare)
    return found


def _untold(job: LanguageJob, why: str) -> dict[str, Any]:
    job.show.note(f"what one shape costs is not told: {why}")
    return {"why": why}


def _apart(job: LanguageJob, cuts: Sequence[Cut], stored: int) -> LanguageJob:
    """The job with a decision for each layer."""
    free = copy.copy(job)
    free.family = Language(
        job.family.model, job.family.calibration, cuts, name=f"{job.family.name} apart"
    )
    count = held(free.family.cuts, stored, job.context)
    costs = LanguageCounts(free.family, stored=stored, context=job.context, held=count)
    free.pricing = Pricing(free.family.space, [costs])
    free.bounds, free.profile = (), None
    free.harm_of = copy.copy(job.harm_of)
    free.harm_of.family = free.family
    return free
