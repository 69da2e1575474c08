"""DeepMAD's design as a program of allocation, solved around one design after another."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from espalier.errors import BudgetError, EspalierError, MissingExtra
from espalier.recipes._parts.deepmad import entropy as deepmad
from espalier.recipes._parts.deepmad.entropy import Wanted
from espalier.recipes._parts.deepmad.near import Near, eight
from espalier.recipes._parts.deepmad.polish import polished
from espalier.solvers.allocate import Program

Choices = Mapping[str, Any]
# options are the design's own widths times these powers; the last step goes by multiples of 8
_STEPS: tuple[float | None, ...] = (1.6, 1.3, 1.15, 1.07, None)


@dataclass(frozen=True)
class Found:
    """A design, its numbers, seconds, and the score after each program that gained, and at last."""

    choices: dict[str, int]
    numbers: dict[str, float]
    seconds: float
    scores: tuple[float, ...]


def design(
    wanted: Wanted,
    *,
    seconds: float = 50,
    each: float = 8,
    seed: int = 0,
    start: Choices | None = None,
) -> Found:
    """The design of most score within the limits that a row of programs leads to.

    Depths, kernels, entropy, effectiveness and cost are exact in each program; the product of a
    stage's entropy with the log of its feature map's size is taken linear around the last design,
    and what it gives is judged exactly. At last single and double changes are tried exactly.
    Errors: `BudgetError` where no design that keeps the limits is found.
    """
    begin = time.perf_counter()
    best: dict[str, int] = dict(start or _first(wanted))
    numbers = deepmad.measured(wanted, best)
    score = numbers["score"] if deepmad.kept(wanted, numbers) else -math.inf
    scores: list[float] = []
    step = 0
    while step < len(_STEPS) and (left := seconds - (time.perf_counter() - begin)) > 0.5:
        hint = best if score > -math.inf else None
        found = _solved(wanted, best, _STEPS[step], min(each, left), seed, hint)
        numbers = deepmad.measured(wanted, found)
        better = deepmad.kept(wanted, numbers) and numbers["score"] > score * (1 + 1e-6)
        gained = numbers["score"] - score if better else 0.0
        if better:
            best, score = found, numbers["score"]
            scores.append(score)
        if not better or gained < 1e-3 * abs(score):
            step += 1
    if score == -math.inf:
        limits = f"{wanted.flops:g} flops, {wanted.params:g} params"
        if wanted.effectiveness is not None:
            limits += f", effectiveness {wanted.effectiveness:g}"
        raise BudgetError(
            f"no design within {limits} was found: raise a limit, or give it more time"
        )
    best = polished(wanted, best, max(seconds - (time.perf_counter() - begin), 2.0))
    scores.append(deepmad.measured(wanted, best)["score"])
    spent = time.perf_counter() - begin
    return Found(best, deepmad.measured(wanted, best), spent, tuple(scores))


def _first(wanted: Wanted) -> dict[str, int]:
    """Where the search begins: groups of one block, a little wider each."""
    width = wanted.stems[-1]
    out = {"stem": width}
    for n, name in enumerate(wanted.layout.groups, 1):
        width = min(width * 2 if n < 4 else width * 3 // 2, wanted.widest)
        width = eight(width)
        inner = width * 4 if wanted.layout.depthwise else width // 4
        kernel = wanted.kernels[0]
        out |= {
            f"{name}.out": width,
            f"{name}.inner": eight(inner),
            f"{name}.kernel": kernel,
            f"{name}.depth": 2,
        }
    return out


def _solved(
    wanted: Wanted,
    center: Choices,
    step: float | None,
    seconds: float,
    seed: int,
    hint: Choices | None,
) -> dict[str, int]:
    """The best design near another one, by the score taken linear there."""
    local = Near(wanted, center, step)
    program = Program(local.space, local.harm(), local.costs(), local.limits())
    start = None if hint is None else local.encoded(hint)
    try:
        answer = program.solve(seconds, seed=seed, hint=start)
    except MissingExtra:
        raise
    except EspalierError:  # none near it, or none in time
        return dict(center)
    return local.decoded(answer.candidate)
