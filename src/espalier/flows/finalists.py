"""From trials to finalists: who keeps the limits as measured, and is worth training to the end."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from espalier.errors import BudgetError
from espalier.flows.job import Job
from espalier.flows.measuring import Measuring
from espalier.flows.pricing import hand_scaled
from espalier.space import Candidate
from espalier.study import Trial

# A finalist must be inside the limit by this much when first measured, so that the noise of the
# second measurement does not throw it out.
_MARGIN = 0.98
_MEASURED_AT_MOST = 40
_SECOND_LOOKS = 3
_PAUSE = 2.0  # seconds


def first_within(
    job: Measuring,
    candidates: Iterable[Candidate],
    count: int,
    taken: Sequence[Candidate] = (),
    key: str = "latency",
) -> list[Candidate]:
    """The first `count` candidates that keep the limits as measured on the real runtime.

    A candidate is measured once a `key`.
    """
    within: list[Candidate] = []
    near: list[Candidate] = []
    ratios: list[float] = []
    for candidate in candidates:
        if len(within) >= count or len(ratios) >= _MEASURED_AT_MOST:
            break
        if candidate in taken:
            continue
        price = job.price(candidate)
        predicted = price["latency_ms"]
        # where the table is off by a factor for all, don't measure what can't keep the limit
        usual = float(np.median(ratios)) if len(ratios) >= 4 else 1.0
        corrected = replace(predicted, value=predicted.value * usual)
        if not job.keeps({**price, "latency_ms": corrected}):
            continue
        reading = job.measured(candidate, None, key)
        ratios.append(reading.value / predicted.value)
        if job.keeps({**price, "latency_ms": reading}, _MARGIN):
            within.append(candidate)
        elif job.keeps({**price, "latency_ms": reading}):
            near.append(candidate)
    return (within + near)[:count]


def ordered(job: Job, trials: Sequence[Trial]) -> list[Candidate]:
    """Trials that keep the limits as predicted, the best estimate first, cheap before dear."""
    sign = -1.0 if job.quality.goal == "max" else 1.0
    done = [t for t in trials if t.state == "done" and not t.violation]
    done.sort(
        key=lambda t: (
            sign * t.metrics[job.quality.name].value,
            t.metrics[job.axis].value,
            t.position,
        )
    )
    return [t.candidate for t in done]


def select(
    job: Job, searched: Sequence[Trial], random: Sequence[Trial]
) -> dict[str, list[Candidate]]:
    """Who is trained to the end: the best found, cheaper ones on the front, the baselines."""
    job.show.phase("measuring finalists on the real runtime", 1)
    top = first_within(job, ordered(job, searched), job.plan.finalists)
    if not top:
        top = _smallest_within(job, searched)
    cheaper = _cheaper(job, searched, top)
    hand = first_within(job, _hand(job), 1)
    by_chance = first_within(job, ordered(job, random), job.plan.finalists)
    return {"search": top, "cheaper": cheaper, "hand": hand, "random": by_chance}


def _smallest_within(job: Job, trials: Sequence[Trial]) -> list[Candidate]:
    rising = sorted(
        (t for t in trials if t.state == "done"), key=lambda t: t.metrics["latency_ms"].value
    )
    cheapest = [t.candidate for t in rising]
    found = first_within(job, cheapest, 1)
    if not found:
        # small machines have slow moments, in which nothing keeps a limit: look once more
        time.sleep(_PAUSE)
        found = first_within(job, cheapest[:_SECOND_LOOKS], 1, key="latency-again")
    if found:
        return found
    least = job.measured(rising[0].candidate, None, "latency")
    raise BudgetError(
        f"no candidate keeps {', '.join(map(str, job.limits))} as measured: the cheapest of "
        f"{len(rising)} trials takes {least.value:.4g} ms on {job.runtime.name}"
    )


def _cheaper(job: Job, trials: Sequence[Trial], top: Sequence[Candidate]) -> list[Candidate]:
    """One front candidate at about half the cost of the best, so that the front has a slope."""
    done = [t for t in trials if t.state == "done" and not t.violation]
    cost = job.price(top[0])[job.axis].value
    cheap = [t for t in done if t.metrics[job.axis].value <= 0.6 * cost]
    return first_within(job, ordered(job, cheap), 1, taken=top)


def _hand(job: Job) -> list[Candidate]:
    codes = hand_scaled(job.family.space)
    keeps = job.problem.violations(job.pricing(codes)) <= 0.05  # the table may be off
    return job.family.space.decode(codes[keeps][::-1])
