"""The times of generation in a shrink: parts timed once, answers measured, limits tightened."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from espalier.compress.language.anatomy import anatomy
from espalier.costs.language_times import SPEEDING, TIMES, Generation, LanguageTimes
from espalier.errors import BudgetError
from espalier.flows.language.harm import logits
from espalier.flows.language.job import LanguageJob
from espalier.problem import Limit, Reading
from espalier.space import Candidate

_ROUNDS = 6  # candidates measured on the way to the limits
_AIM, _CLOSE = 0.97, 0.93  # noise allowed
_LOOKS = 3  # the middle of this many measurements counts
_TOLD, _TOLD_SECONDS = 0.01, 0.2  # where times are only told: share of all time, seconds of each
WRITTEN = 13  # tokens that measuring writes behind the context

Solve = Callable[[Sequence[Limit]], Candidate]


def timed_limits(job: LanguageJob) -> list[Limit]:
    """The limits that need a clock."""
    return [x for x in job.limits if x.metric in TIMES]


def times(job: LanguageJob) -> LanguageTimes:
    """Times every option of every kind that makes parts faster, all layers at once; recorded."""
    job.show.phase("timing the parts of the model", 1)
    return LanguageTimes(job.family, job.once("times", lambda: sweep(job)))


def sweep(job: LanguageJob) -> dict[str, Any]:
    """Metric -> part -> decision -> milliseconds at each option, as `LanguageTimes` reads it."""
    family, space = job.family, job.family.space
    runtime: Generation = job.runtime
    own = {d.name: d for d in space.decisions if d.name.partition(":")[0] in SPEEDING}
    base = runtime.parts(family.model, _modules(family.model))
    out: dict[str, Any] = {m: {n: {"": v} for n, v in base[m].items()} for m in TIMES}
    kinds = list(dict.fromkeys(name.partition(":")[0] for name in own))
    for number, kind in enumerate(kinds):
        names = [n for n in own if n.startswith(f"{kind}:")]
        most = max(own[n].count for n in names)
        rows: list[dict[str, dict[str, float]]] = []
        for level in range(most - 1):
            chosen = dict(family.original)
            chosen |= {n: own[n].options[min(level, own[n].count - 1)] for n in names}
            candidate = space.candidate(chosen)
            model = family.build(candidate)
            rows.append(runtime.parts(model, _modules(model), family.cache(candidate)))
            job.show.step(number * most + level, len(kinds) * most)
        for metric in TIMES:
            for name in names:
                for part in _parts_of(name, out[metric]):
                    line = [rows[i][metric][part] for i in range(own[name].count - 1)]
                    line.append(base[metric][part])
                    out[metric][part][name] = [float(v) for v in np.maximum.accumulate(line)]
    return out


def _parts_of(name: str, parts: Any) -> list[str]:
    """The parts that a decision makes faster: those of its layer, or all."""
    kind, _, place = name.partition(":")
    word = "feed-forward" if kind in ("units", "experts", "active") else "attention"
    if kind == "hidden":
        return list(parts)
    return [p for p in parts if p.endswith(word) and place in ("every", p.rpartition(" ")[0])]


def _modules(model: nn.Module) -> dict[str, list[str]]:
    """Part, as counted, -> the modules that do its work."""
    found: dict[str, list[str]] = {}
    for layer in anatomy(model).layers:
        if layer.attention is not None:
            found[f"{layer.path} attention"] = [layer.attention.path]
        feed: Any = layer.feed
        if feed is not None:
            apart = feed.path == layer.path  # OPT has no module around its two maps
            found[f"{layer.path} feed-forward"] = (
                [feed.up.path, feed.down.path] if apart else [feed.path]
            )
    return found


def measured(job: LanguageJob, candidate: Candidate, key: str = "cut") -> dict[str, Reading]:
    """The times of a candidate's shape, the middle of three measurements, recorded."""

    def measure() -> dict[str, Any]:
        model = job.family.build(candidate)
        rows = [job.runtime.measure(model, job.family.cache(candidate)) for _ in range(_LOOKS)]
        middle = {m: sorted(r[m] for r in rows) for m in TIMES}
        return {m: [v[_LOOKS // 2], (v[-1] - v[0]) / 2] for m, v in middle.items()}

    found = job.study.once(f"measured {key}/{candidate.id}", measure)
    return {m: Reading(v[0], "ms", "measured", "", v[1]) for m, v in found.items()}


def told_times(
    job: LanguageJob, candidate: Candidate, make: Callable[[], nn.Module]
) -> dict[str, Any]:
    """Times of the original and of an answer where none is limited, each measured once; recorded.
    Empty where that takes more than a small share of the time."""
    ends = getattr(job.family.cache(candidate), "capacity", 0) or job.family.anatomy.context
    tokens = min(job.task.context, min(ends, job.family.anatomy.context) - WRITTEN)
    if job.runtime is not None or tokens < 1:
        return {}
    runtime = Generation(tokens, job.asked.threads, _TOLD_SECONDS)

    def measure() -> dict[str, Any]:
        if job.budget.seconds is not None and _seconds(job, tokens) > _TOLD * job.budget.seconds:
            return {}
        before = runtime.measure(job.family.model)
        after = runtime.measure(make(), job.family.cache(candidate))
        return {"original": before, "shrunk": after, "tokens": tokens, "threads": runtime.threads}

    found: dict[str, Any] = job.study.once(f"told times/{candidate.id}", measure)
    return found


def _seconds(job: LanguageJob, tokens: int) -> float:
    """About what two measurements take, from one pass over the context and one over a token."""
    passes, steps = 6, 61  # of `Generation.measure`, at least
    ids, seconds = job.task.windows("train", 1), 0.0
    for count, times in ((tokens, passes), (1, steps)):
        began = time.perf_counter()
        with torch.inference_mode():
            logits(job.family.model, ids[:, :count])
        seconds += times * (time.perf_counter() - began)
    return 2 * max(seconds, _TOLD_SECONDS)


def fitted(job: LanguageJob, solve: Solve) -> Candidate:
    """The best candidate that keeps every limit as measured, in a few rounds: each corrects the
    limits on predicted times by what its answer measures. `job.bounds` are then the corrected ones.

    Errors: `BudgetError` with what the fastest answer takes.
    """
    limits = timed_limits(job)
    job.bounds = tuple(job.limits)
    if not limits:
        return solve(job.limits)
    looks = {x.metric: _Looks(x) for x in limits}
    seen: set[Candidate] = set()

    def look(candidate: Candidate) -> float:
        """The largest share of a limit that a candidate takes, as measured."""
        found, price = measured(job, candidate), job.price(candidate)
        for metric, own in looks.items():
            own.add(price[metric].value, found[metric].value)
        note(job, candidate, found, limits) if candidate not in seen else None
        seen.add(candidate)
        return max(found[x.metric].value / x.bound for x in limits)

    predicted = job.price(job.family.original)
    for metric, own in looks.items():
        own.add(predicted[metric].value, job.original.metrics[metric].value)
    kept: tuple[Candidate, tuple[Limit, ...]] | None = None
    closest, last = 0.0, ""
    for _ in range(_ROUNDS):
        bounds = tuple(
            replace(x, bound=looks[x.metric].bound()) if x.metric in looks else x
            for x in job.limits
        )
        try:
            candidate = solve(bounds)
        except BudgetError as error:
            last = last or str(error)
            smallest = job.smallest()
            if kept is not None or smallest in seen:
                break
            look(smallest)  # the prediction may be too dark
            last = ", ".join(own.told() for own in looks.values())
            continue
        again = candidate in seen
        share = look(candidate)
        last = ", ".join(own.told() for own in looks.values())
        if share <= 1 and share >= closest:
            kept, closest = (candidate, bounds), share
        if kept is not None and (again or _CLOSE <= share <= 1 or candidate == job.family.original):
            break
    if kept is None:
        raise BudgetError(
            f"no shrunk {job.family.name} keeps {', '.join(map(str, job.limits))} as measured: {last}; "
            f"raise the limit{_faster(job)}"
        )
    candidate, job.bounds = kept
    return candidate


class _Looks:
    """What a time was predicted to be and measured to be, and the predicted time that the limit on
    the measured one stands for."""

    def __init__(self, limit: Limit) -> None:
        self.limit = limit
        self._rows: list[tuple[float, float]] = []

    def add(self, predicted: float, measured: float) -> None:
        """One candidate."""
        self._rows.append((predicted, measured))

    def bound(self) -> float:
        """Between the slowest that kept the limit and the fastest that did not, on the line
        between them; in proportion to the last one where all were on one side of it."""
        goal, most = _AIM * self.limit.bound, self.limit.bound
        below = max((row for row in self._rows if row[1] <= most), default=None)
        above = min(
            (r for r in self._rows if r[1] > most and (below is None or r[0] > below[0])),
            default=None,
        )
        if below is None or above is None:
            predicted, measured = self._rows[-1]
            return goal * predicted / measured
        share = (goal - below[1]) / (above[1] - below[1])
        return below[0] + min(max(share, 0.0), 0.99) * (above[0] - below[0])

    def told(self) -> str:
        """The last one beside the limit."""
        return f"{self.limit.metric} {self._rows[-1][1]:.4g} of {self.limit.bound:.4g}"


def _faster(job: LanguageJob) -> str:
    """Kinds of decision that make parts faster and were not allowed, in words."""
    known = {d.name.partition(":")[0] for d in job.family.space.decisions}
    names = {"attention": "sublayers", "heads": "heads", "units": "units", "hidden": "hidden"}
    more = [name for kind, name in names.items() if kind not in known and not job.grouped]
    return f", or allow further decisions, like {', '.join(more)}" if more else ""


def note(
    job: LanguageJob, candidate: Candidate, found: dict[str, Reading], limits: Sequence[Limit]
) -> None:
    """A row for each measured limit on the way."""
    price = job.price(candidate)
    for limit in limits:
        value = found[limit.metric].value
        job.rounds.append(
            {
                "name": f"shrunk, {limit.metric}",
                "candidate": candidate.id,
                "predicted": price[limit.metric].value,
                "measured": value,
                "limit": limit.bound,
                "kept": value <= limit.bound,
            }
        )
        word = "keeps" if value <= limit.bound else "breaks"
        job.show.note(f"{limit.metric}: {value:.4g} ms measured, {word} {limit.bound:.4g} ms")


def still_kept(job: LanguageJob, candidate: Candidate, otherwise: Candidate) -> Candidate:
    """A candidate where it keeps the limits as measured, else the one that did."""
    limits = timed_limits(job)
    if not limits or candidate == otherwise:
        return candidate
    found = measured(job, candidate)
    note(job, candidate, found, limits)
    return candidate if all(found[x.metric].value <= x.bound for x in limits) else otherwise
