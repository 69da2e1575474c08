"""How a shrink of a language model decides: the exact program on what options harm, then evolution
on calibration loss from its answer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.errors import BudgetError
from espalier.flows.language.job import LanguageJob
from espalier.problem import Limit
from espalier.solvers.allocate import Program, Solution
from espalier.space import Candidate

Codes = NDArray[Any]
_SHARE = 0.15  # of the whole time, for evolution
_PARENTS, _CHILDREN, _TRIED = 6, 400, 6  # a generation: from, proposed, judged as a whole
_MOST = 120  # candidates judged without a limit on time
_FINALISTS = 3  # judged on validation
_FORBIDDEN = 5  # further answers of the program that evolution begins from


def program(job: LanguageJob, limits: Sequence[Limit] | None = None) -> Program:
    """The exact program on the harm of every option, under all limits at once."""
    wanted = (job.bounds or job.limits) if limits is None else limits
    harm = () if job.profile is None else job.profile.factors
    costs = job.factors([x.metric for x in wanted])
    return Program(job.family.space, harm, costs, wanted)


def solved(job: LanguageJob, limits: Sequence[Limit] | None = None, **more: Any) -> Solution:
    """The program's answer. Errors: `BudgetError` with the least that is reachable."""
    return program(job, limits).solve(seconds=seconds(job), seed=job.seed, **more)


def seconds(job: LanguageJob) -> float:
    """What one program may take."""
    return 20.0 if job.budget.seconds is None else float(np.clip(job.budget.seconds / 40, 1, 20))


# --- evolution -------------------------------------------------------------------------------


def evolved(job: LanguageJob, starts: Sequence[Candidate]) -> list[Candidate]:
    """The best few by judged harm of candidates near given ones and the program's answers, within
    the limits.

    A generation: many changes of the best few by one or two steps, those within the limits that the
    profile finds best are judged as wholes. Its length is recorded, so that a resumed run does the
    same.
    """
    started = time.time()
    share = None if job.budget.seconds is None else _SHARE * job.budget.seconds
    job.show.phase("search around the program's answer", _MOST)
    search = _Search(job, starts)
    known: int | None = job.study.recorded().get("generations")
    count = 0
    while known is None or count < known:
        late = share is not None and time.time() - started > share
        if known is None and (late or len(search.harm) >= _MOST or search.stale >= 4):
            break
        if not search.generation(count):
            break
        count += 1
    job.study.once("generations", lambda: count)
    return sorted(search.harm, key=lambda c: search.harm[c])[:_FINALISTS]


def finalist(job: LanguageJob, candidates: Sequence[Candidate]) -> Candidate:
    """The candidate of least validation loss after layer-wise reconstruction: divergence on a few
    windows ranks well, but what is handed out is judged by its loss."""
    few = list(dict.fromkeys(candidates))
    job.show.phase("the best few on validation", len(few))
    losses = []
    for i, candidate in enumerate(few):
        losses.append(job.validation_of(candidate))
        job.show.step(i + 1, len(few))
    return few[int(np.argmin(losses))]


class _Search:
    def __init__(self, job: LanguageJob, starts: Sequence[Candidate]) -> None:
        self.job, self.space = job, job.family.space
        self.program = program(job)
        self.harm: dict[Candidate, float] = {}
        self.stale = 0
        answers = list(dict.fromkeys(starts))
        for _ in range(_FORBIDDEN):
            try:
                answers.append(solved(job, forbidden=answers).candidate)
            except BudgetError:
                break
            except Exception:  # the program ran out of time: what there is, is enough
                break
        for candidate in answers:
            self.judge(candidate)

    @property
    def best(self) -> Candidate:
        return min(self.harm, key=lambda c: self.harm[c])

    def judge(self, candidate: Candidate) -> None:
        if candidate not in self.harm:
            self.harm[candidate] = self.job.judged(candidate)[self.job.measure]
            self.job.show.step(len(self.harm), _MOST)

    def generation(self, number: int) -> bool:
        """One more; False where nothing new lies within the limits."""
        rng = np.random.default_rng([self.job.seed, 0xE70, number])
        best = sorted(self.harm, key=lambda c: self.harm[c])[:_PARENTS]
        codes = self.proposals(self.space.encode(best), rng)
        if len(codes) == 0:
            return False
        before = self.harm[self.best]
        for candidate in self.space.decode(codes[:_TRIED]):
            self.judge(candidate)
        found = self.harm[self.best]
        self.stale = 0 if found < before else self.stale + 1
        if found < before:
            self.job.show.best(f"{self.job.measure} {found:.4g} on calibration")
        return True

    def proposals(self, parents: Codes, rng: np.random.Generator) -> Codes:
        """New rows within the limits, the best by the profile first, some by chance."""
        rows = np.repeat(parents, -(-_CHILDREN // len(parents)), axis=0)
        rows = stepped(self.space, rows, rng)
        mixed = self.space.cross(rows, rows[rng.permutation(len(rows))], rng)
        rows = np.concatenate([rows, mixed])
        rows = rows[self.space.valid(rows)]
        rows = rows[self.space.unique(rows)]
        harm, over, _ = self.program.judge(rows)
        rows, harm = rows[over <= 0], harm[over <= 0]
        new = [c not in self.harm for c in self.space.decode(rows)]
        rows, harm = rows[new], harm[new]
        order = np.argsort(harm * rng.uniform(0.9, 1.1, len(harm)), kind="stable")
        found: Codes = rows[order]
        return found


def stepped(space: Any, rows: Codes, rng: np.random.Generator) -> Codes:
    """Rows with one to four decisions moved by a step, canonical."""
    out = rows.copy()
    counts = np.array([d.count for d in space.decisions])
    for row in out:
        few = min(int(rng.integers(1, 5)), len(counts))
        for j in rng.choice(len(counts), size=few, replace=False):
            row[j] = np.clip(row[j] + rng.choice([-1, 1]), 0, counts[j] - 1)
    fixed: Codes = space.canonical(out)
    return fixed
