"""What an answer is compared with: all layers thinned alike, one threshold on the importance of all
channels, and the best of random candidates."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from espalier.compress.widths import PREFIX, BoundWidths
from espalier.errors import BudgetError
from espalier.flows.fitting import Solve, fitted
from espalier.flows.pricing import hand_scaled
from espalier.flows.shrinking import Shrinking
from espalier.problem import Limit, Problem
from espalier.space import Candidate

_SHARES = 400
_DRAWN = 4000
_MOST, _LEAST, _TIME = 200, 4, 0.07  # random candidates judged; share of the whole time for it
_FILLED = 0.85  # random candidates that leave more of the budget unused are not judged


def rivals(job: Shrinking) -> dict[str, Candidate]:
    """Name to candidate; one that can't keep the limits as measured is left out."""
    out: dict[str, Candidate] = {}
    ways = {"uniform": uniform, "random": by_chance}
    if any(isinstance(cut, BoundWidths) for cut in job.family.cuts):
        ways = {"uniform width": uniform, "global threshold": thresholded, "random": by_chance}
    for name, make in ways.items():
        if not job.affords(2 + len(out)):
            text = f"baseline {name} is left out: its repair and test would take the answer's time"
            job.show.note(text)
            job.study.notes.append(text)
            continue
        try:
            out[name] = fitted(job, name, make(job))
        except BudgetError as error:
            job.show.note(f"baseline {name} is left out: {error}")
    return out


def uniform(job: Shrinking) -> Solve:
    """All widths as nearly as they can be the same share; without widths, everything scaled."""
    space = job.family.space
    codes = hand_scaled(space, _SHARES)
    others = [i for i, d in enumerate(space.decisions) if not d.name.startswith(PREFIX)]
    if len(others) < len(space):
        codes[:, others] = space.corner(last=True)[0, others]
        codes = space.canonical(codes)
        codes = codes[space.valid(codes)]
    return _best_of(job, codes[::-1])


def thresholded(job: Shrinking) -> Solve:
    """Channels below one threshold on importance go, wherever they are; all else as it was.

    Importances have mean 1 in each group, as pruning tools take them (Torch-Pruning; Fang et al.,
    DepGraph, 2023); each width is the option nearest to what is above the threshold.
    """
    space = job.family.space
    found = job.importances.items()
    even = {PREFIX + n: s / s.mean().clamp(min=1e-12) for n, s in found}
    every = torch.cat(list(even.values())).sort().values
    places = torch.linspace(0, len(every) - 1, min(_SHARES, len(every))).long()
    codes = np.repeat(space.corner(last=True), len(places), axis=0)
    for column, decision in enumerate(space.decisions):
        if decision.name in even:
            kept = len(even[decision.name]) - torch.searchsorted(
                even[decision.name].sort().values, every[places]
            )
            options = torch.tensor([float(o) for o in decision.options])
            codes[:, column] = (kept[:, None] - options).abs().argmin(1).numpy()
    codes = space.canonical(codes)
    return _best_of(job, codes[space.valid(codes)])


def by_chance(job: Shrinking) -> Solve:
    """Random candidates that use most of the budget; the least harm of those judged."""
    space = job.family.space
    rng = np.random.default_rng([job.seed, 0xC4A])
    counts = np.array([d.count for d in space.decisions])
    # small and large ones alike: uniform draws hardly ever come near a tight limit
    power = rng.choice([0.25, 0.5, 1.0, 1.6, 2.5], size=(_DRAWN, 1))
    codes = np.floor(counts * rng.random((_DRAWN, len(counts))) ** power).astype(space.dtype)
    codes = space.canonical(np.minimum(codes, counts - 1).astype(space.dtype))
    codes = codes[space.valid(codes)]
    codes = codes[space.unique(codes)]
    prices = job.pricing(codes)
    ends = math.inf if job.budget.seconds is None else time.time() + _TIME * job.budget.seconds
    known: dict[int, float] = {}  # a limit that moves meets the same rows again

    def solve(limits: Sequence[Limit]) -> Candidate:
        kept = Problem((), tuple(limits)).violations(prices) <= 0
        full = np.max([prices[x.metric] / x.bound for x in limits], axis=0)
        near = np.flatnonzero(kept & (full >= _FILLED))
        rows = near if len(near) else np.flatnonzero(kept)
        if not len(near) and any(i in known for i in rows.tolist()):
            rows = np.array([i for i in rows.tolist() if i in known])  # none is worth a look
        if not len(rows):
            raise BudgetError(f"none of {_DRAWN} random candidates keeps the limits")
        return space.decode(codes[[_least_harm(job, codes, rows, known, ends)]])[0]

    return solve


def _least_harm(
    job: Shrinking,
    codes: NDArray[Any],
    rows: NDArray[np.int64],
    known: dict[int, float],
    ends: float,
) -> int:
    """The best of the rows that are known, and of as many more as there were options to profile, or
    as the time allows."""
    found = [(known[i], i) for i in map(int, rows) if i in known]
    more = [i for i in map(int, rows) if i not in known]
    count = max(min(len(rows), job.options, _MOST) - len(found), 0)
    job.show.phase("judging random candidates", count)
    for done, i in enumerate(more[:count]):
        if time.time() > ends and len(found) >= _LEAST:
            break
        known[i] = job.harm(job.family.space.decode(codes[[i]]))[0]
        found.append((known[i], i))
        job.show.step(done + 1, count)
    return min(found)[1]


def _best_of(job: Shrinking, rows: NDArray[Any]) -> Solve:
    """The first of rows that keeps the limits; they go from the largest to the smallest."""
    prices = job.pricing(rows)

    def solve(limits: Sequence[Limit]) -> Candidate:
        kept = np.flatnonzero(Problem((), tuple(limits)).violations(prices) <= 0)
        if len(kept) == 0:
            raise BudgetError(f"no cut of this kind keeps {', '.join(map(str, limits))}")
        return job.family.space.decode(rows[kept[:1]])[0]

    return solve
