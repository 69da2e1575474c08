"""Solve, build, measure, tighten: until the measured cost is just within the limit."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from espalier.compress import Widths
from espalier.errors import BudgetError, EspalierError, NotInTimeError
from espalier.flows.repairing import mended
from espalier.flows.shrinking import LATENCY, Shrinking
from espalier.problem import Limit, Reading
from espalier.space import Candidate

# A candidate that is first measured inside the limit by this much stays inside it when its
# repaired weights are measured again, noise allowed; nearer than `_CLOSE` is not worth a round.
_AIM, _CLOSE = 0.985, 0.965
_ROUNDS = 8  # candidates measured
_HURRIED, _SPENT = 3, 0.05  # rounds where they took more than this share of the time that is left
_ALONE = 0.5  # the same of all ways to solve, where no training waits for the time
_FREE = 1e3  # times the bound: no limit at all
_FURTHEST = 4.0  # times the first bound, where nothing keeps that by the table
_LAST_ROUNDS = 4  # where nothing kept the limit by then, in larger steps
_SOLVED = 24  # answers asked for, those that were measured before included
_LOOKS = 3  # of which the middle counts on a busy machine, and just within the limit
_NARROW = 0.05  # of a width: where less than that is left no more is to be had
_JUST = 0.97  # of the limit: nearer, and a lucky look would be found out after the repair

# The best candidate within limits on predicted costs. `BudgetError` where there is none.
Solve = Callable[[Sequence[Limit]], Candidate]


def best_fitted(
    job: Shrinking, name: str, solves: Mapping[str, Solve], tighten: float = 1.0
) -> dict[str, Candidate]:
    """What several ways to solve find: the best by validation, after statistics and least squares,
    comes first and has `name`; the others have the names of their ways. Where no way keeps the
    limits as measured, the candidate of the least latency is the answer, if it does.

    Errors: `BudgetError` with what is reachable, or that of the first way.
    """
    found: dict[Candidate, str] = {}
    refused: list[EspalierError] = []
    for way, solve in solves.items():
        try:
            found.setdefault(fitted(job, name, solve, tighten, len(solves)), way)
        except (BudgetError, NotInTimeError) as error:
            refused.append(error)
    if not found:
        return {name: _cheapest_or(refused[0], job, name, tighten)}
    if len(found) == 1:
        return {name: next(iter(found))}
    best = max(found, key=lambda candidate: mended(job, name, candidate))
    return {name: best} | {way: c for c, way in found.items() if c != best}


def fitted(
    job: Shrinking, name: str, solve: Solve, tighten: float = 1.0, ways: int = 1
) -> Candidate:
    """The best candidate that keeps every limit as measured, found in a few rounds.

    `solve` reads limits on predicted latency; each round corrects that limit by what its answer
    measures. `tighten` asks for less than the limit. Where nothing is trained so many `ways` share the time. Every round is noted in `job.rounds`.
    Errors: `BudgetError` where none of its answers does.
    """
    limit = job.latency_limit
    if limit is None or job.predicted is None:
        return solve(job.limits)
    again = tighten < 1.0
    return _Fitting(job, name, solve, limit, limit.bound * tighten, ways, again).run()


class _Fitting:
    """The bound on the prediction lies between one that kept the limit and one that broke it."""

    def __init__(
        self,
        job: Shrinking,
        name: str,
        solve: Solve,
        limit: Limit,
        wanted: float,
        ways: int,
        again: bool,
    ) -> None:
        self.job, self.name, self.solve, self.limit, self.wanted = job, name, solve, limit, wanted
        self.kept: tuple[float, Candidate] | None = None
        self.broken = float("inf")
        self.times: dict[Candidate, float] = {}
        self.free: list[Candidate | None] | None = None  # the answer where latency is no matter
        self.began, self.ways, self.again = time.monotonic(), ways, again

    def run(self) -> Candidate:
        job = self.job
        bound = self.first()
        highest = _FURTHEST * bound
        for _ in range(_SOLVED):
            candidate = self.answer(bound)
            if candidate is None and not self.times and bound < highest:
                bound *= 1.5  # the table may be too high for what this way to solve allows
                continue
            if candidate is None:
                break
            new = candidate not in self.times
            took = self.measured(candidate, bound)
            if took <= self.wanted:
                if self.kept is None or bound > self.kept[0]:
                    self.kept = bound, candidate
                if took >= _CLOSE * self.wanted or candidate == job.family.original:
                    break
                if not new and not self.binds(candidate, bound):
                    break
            else:
                self.broken = min(self.broken, bound)
            rounds = len(self.times)
            enough = _HURRIED if self.hurried() else _ROUNDS
            if rounds >= enough and (self.kept or rounds >= _ROUNDS + _LAST_ROUNDS):
                break
            following = self.next(bound, took, new)
            if abs(following - bound) < 0.003 * bound:
                break
            bound = following
        if self.kept:
            return self.kept[1]
        told = f": the least took {min(self.times.values()):.4g} ms" if self.times else ""
        raise BudgetError(f"nothing of this kind keeps {self.wanted:.4g} ms as measured{told}")

    def first(self) -> float:
        """The bound to begin with: where this was solved before, what kept the limit then tells it."""
        kept = [r for r in self.job.rounds if r["name"] == self.name and r["kept"]]
        if self.again and kept and kept[-1]["bound"] > 0:
            return float(_AIM * kept[-1]["bound"] * self.wanted / kept[-1]["measured"])
        predicted = self.job.price(self.job.family.original)[LATENCY].value
        return self.wanted * predicted / self.job.original.metrics[LATENCY].value

    def binds(self, candidate: Candidate, bound: float) -> bool:
        """Whether a limit on latency changes the answer, or another is what holds it back."""
        if self.free is None:
            self.free = [self.answer(_FREE * bound)]
        return self.free[0] != candidate

    def hurried(self) -> bool:
        """Whether a closer fit would take time that repair needs."""
        left = self.job.left()
        share = _SPENT if self.job.trains else _ALONE / self.ways
        return left is not None and time.monotonic() - self.began > share * left

    def answer(self, bound: float) -> Candidate | None:
        limits = [replace(x, bound=bound) if x is self.limit else x for x in self.job.limits]
        try:
            return self.solve(limits)
        except (BudgetError, NotInTimeError):
            return None

    def next(self, bound: float, took: float, new: bool) -> float:
        """What the last measurement asks for, inside what is known; halfway where it is not new."""
        low = self.kept[0] if self.kept else 0.0
        step = bound * _AIM * self.wanted / took
        if len(self.times) >= _ROUNDS and not self.kept:
            step = min(step, 0.85 * bound)
        if new and low < step < self.broken:
            return step
        if not low:
            return 0.95 * min(self.broken, bound)
        return (low + self.broken) / 2 if self.broken < float("inf") else 1.03 * bound

    def measured(self, candidate: Candidate, bound: float) -> float:
        if candidate not in self.times:
            # what was found over the limit after its repair is not chosen again
            took = measured(self.job, candidate, self.wanted, not self.hurried())
            took = max(took, self.job.slower.get(candidate, 0.0))
            self.times[candidate] = took
            _note(self.job, self.name, candidate, bound, took, self.wanted)
        return self.times[candidate]


def measured(job: Shrinking, candidate: Candidate, wanted: float, patient: bool = True) -> float:
    """Milliseconds on the runtime; the middle of several measurements where one leaves it open whether
    that is within what is wanted, and if `patient` on a busy machine."""
    first = job.measured(candidate, None, "latency")
    busy = job.study.once(f"latency/{candidate.id}", dict).get("busy")
    certain = max(first.spread or 0.0, (1 - _JUST) * wanted)
    if not (busy and patient) and not first.value <= wanted < first.value + certain:
        return first.value
    more = [job.measured(candidate, None, f"latency-{i}") for i in range(1, _LOOKS)]
    return float(np.median([first.value, *(r.value for r in more)]))


def _cheapest_or(refused: EspalierError, job: Shrinking, name: str, tighten: float) -> Candidate:
    """The candidate of the least latency, where a limit is on latency and its pieces add up."""
    if job.latency_limit is None or job.predicted is None:
        raise refused
    try:
        candidate = least(job, LATENCY)
    except BudgetError:
        raise
    except EspalierError as error:  # not in time, or costs that are only known of whole networks
        raise refused from error
    return within(job, name, candidate, job.latency_limit.bound * tighten)


def within(job: Shrinking, name: str, candidate: Candidate, wanted: float) -> Candidate:
    """The smallest candidate, where it keeps all limits as measured.

    Errors: `BudgetError` with what it takes.
    """
    took = measured(job, candidate, wanted)
    _note(job, name, candidate, 0.0, took, wanted)
    reading = Reading(took, "ms", "measured")
    if took <= wanted and job.keeps({**job.price(candidate), LATENCY: reading}):
        return candidate
    limit = job.latency_limit
    assert limit is not None
    over = reading.value / limit.bound - 1
    share = reading.value / job.original.metrics[LATENCY].value
    raise BudgetError(
        f"no shrunk {job.family.name} keeps {', '.join(map(str, job.limits))} as measured: the "
        f"smallest takes {reading.value:.4g} ms, {over:.0%} over {limit.bound:.4g} ms and "
        f"{share:.0%} of the original's, on {job.runtime.name}; raise the limit or {further(job)}"
    )


def further(job: Shrinking) -> str:
    """How the decisions could reach smaller networks, in words."""
    if any(isinstance(cut, Widths) and cut.least > _NARROW for cut in job.cuts):
        return f"let widths go down further, with width:least={_NARROW:.0%}/steps=10 as a decision"
    return "allow more decisions"


def least(job: Shrinking, metric: str) -> Candidate:
    """The candidate of the least predicted cost that keeps the other limits, if any can."""
    from espalier.flows.solving import cheapest_program

    return cheapest_program(job, metric)


def _note(
    job: Shrinking, name: str, candidate: Candidate, bound: float, measured: float, wanted: float
) -> None:
    job.rounds.append(
        {
            "name": name,
            "candidate": candidate.id,
            "bound": bound,
            "predicted": job.price(candidate)[LATENCY].value,
            "measured": measured,
            "limit": wanted,
            "kept": measured <= wanted,
        }
    )
    word = "keeps" if measured <= wanted else "breaks"
    job.show.note(f"{name}: {measured:.4g} ms measured, {word} {wanted:.4g} ms")
