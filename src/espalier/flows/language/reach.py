"""Limits that no candidate keeps: refused before anything dear, with what is reachable and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.compress import Cut
from espalier.compress.language.cache.cuts import held
from espalier.compress.language.family import Language
from espalier.costs.language import LanguageCounts
from espalier.errors import BudgetError, EspalierError
from espalier.flows.language.cuts import further
from espalier.flows.language.job import LanguageJob
from espalier.flows.language.solving import seconds
from espalier.problem import Limit
from espalier.solvers.allocate import Program
from espalier.space import Space

_WRITTEN = {"attention": "sublayers", "feed": "sublayers", "block": "blocks", "bits": "tables"}
_ROWS = (1, 8)  # of calibration that shapes are read on: nothing is judged


def check_reach(job: LanguageJob, cuts: Sequence[Cut], stored: int) -> None:
    """Refuses limits on counted costs that nothing keeps.

    Errors: `BudgetError` with what is reachable with the decisions that were allowed, what the
    tables of tokens take, and which further kinds of decision would reach how far.
    """
    counted = [x for x in job.limits if x.metric in job.pricing.metrics]
    costs = job.factors([x.metric for x in counted])
    try:
        Program(job.family.space, (), costs, counted).solve(seconds=seconds(job))
    except BudgetError as error:
        fixed = {
            f.name: float(f.values)
            for f in costs.get("bytes", ())
            if f.name in ("embedding", "head") and not f.decisions
        }
        bound = next((x.bound for x in counted if x.metric == "bytes"), None)
        told = f"{error}"
        if bound is not None and sum(fixed.values()) > bound:
            parts = " and ".join(f"{v:,.0f} bytes of {k}" for k, v in fixed.items())
            told = f"bytes <= {bound:,.0f} is below the table of tokens: {parts} stay as they are; {told}"
        raise BudgetError(f"{told}; {_advice(job, cuts, stored, counted)}") from None


def _advice(job: LanguageJob, cuts: Sequence[Cut], stored: int, limits: Sequence[Limit]) -> str:
    """What would go lower, in words."""
    try:
        own, rows = _reached(job, cuts, stored, [x.metric for x in limits])
    except EspalierError:  # decisions that do not go together
        return "raise the limit or allow more decisions"
    broken = [x for x in limits if own[x.metric] > x.bound] or list(limits)
    metric = broken[0].metric
    lower = {name: found for name, found in rows.items() if found[metric] < own[metric]}
    kept = {n: r for n, r in lower.items() if all(r[x.metric] <= x.bound for x in limits)}
    single = {n: r for n, r in kept.items() if n != _ALL} or kept
    if not lower:
        return "raise the limit: no further kind of decision goes lower"
    if single:
        ways = ", ".join(f"{n} {r[metric]:,.0f}" for n, r in _least(single, metric)[:4])
        return f"raise the limit, or allow further decisions, which reach {metric} of: {ways}"
    name, found = _least(lower, metric)[0]
    others = ", ".join(n for n in lower if n != _ALL)
    how = f"{others} together reach" if name == _ALL else f"{name} reaches"
    return f"raise the limit: of all further decisions, {how} {metric} of {found[metric]:,.0f}"


_ALL = "all together"
_Row = dict[str, float]
Codes = NDArray[Any]


def _least(rows: dict[str, _Row], metric: str) -> list[tuple[str, _Row]]:
    return sorted(rows.items(), key=lambda pair: pair[1][metric])


def _reached(
    job: LanguageJob, cuts: Sequence[Cut], stored: int, metrics: Sequence[str]
) -> tuple[_Row, dict[str, _Row]]:
    """The smallest model's costs with the decisions that were allowed, and with each further kind
    beside them. Each is what a model of the space costs: no bound, but an example."""
    names, wide = further(cuts, job.family.anatomy, job.context, job.grouped)
    rows, tokens = _ROWS
    sample = job.family.calibration[:rows, :tokens]
    family = Language(job.family.model, sample, [_plain(cut) for cut in wide], grouped=job.grouped)
    count = held(family.cuts, stored, job.context)
    counts = LanguageCounts(family, stored=stored, context=job.context, held=count)
    space, allowed = family.space, set(job.family.space.names)

    def smallest(extra: Sequence[str]) -> _Row:
        code = space.corner(True)
        for i, decision in enumerate(space.decisions):
            if decision.name in allowed or _name(decision.name) in extra:
                code[0, i] = 0
        found = counts.estimate_codes(_allowed(space, code))
        return {m: float(found[m][0]) for m in metrics}

    rows_of = {name: smallest([name]) for name in names}
    return smallest([]), {**rows_of, _ALL: smallest(names)}


def _allowed(space: Space, code: Codes) -> Codes:
    """The row, with one decision as in the original where the space's rules ask for it: of all
    attentions, or all blocks, one stays."""
    last = space.corner(True)
    for i in (None, *np.flatnonzero(code[0] != last[0])):
        one = code.copy()
        if i is not None:
            one[0, i] = last[0, i]
        found = space.canonical(one)  # what is not active then has no option of its own left
        if space.valid(found)[0]:
            return found
    return last


def _name(decision: str) -> str:
    """The kind, as it is written, that brings a decision."""
    kind = decision.partition(":")[0]
    return _WRITTEN.get(kind, kind)


def _plain(cut: Cut) -> Cut:
    """A cut whose parts go in the order that is found fastest: only sizes are asked for."""
    fast: Any = {"importance": "norm", "compensate": False}
    own: Any = cut
    known = {f.name for f in fields(own)} if is_dataclass(own) else set()
    found: Cut = replace(own, **{n: v for n, v in fast.items() if n in known})
    return found
