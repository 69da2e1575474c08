"""How a shrink decides: an exact program on profiles, a search, or relaxation; and which, and why."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from espalier.compress import Pretrained
from espalier.compress.bits import BoundBits
from espalier.costs import Cost, Counts
from espalier.errors import BudgetError, EspalierError, unknown
from espalier.estimators.calibration import MEASURES
from espalier.flows.evaluate import Score
from espalier.flows.fitting import Solve, further
from espalier.flows.measuring import how_many
from espalier.flows.shrinking import LATENCY, Shrinking
from espalier.problem import Limit, Metrics, Problem
from espalier.solvers import strategies
from espalier.solvers.allocate import Factor, Program, cost_factors
from espalier.solvers.allocate.cpsat import programs
from espalier.space import Candidate
from espalier.study import Serial, Trial

SOLVERS: Mapping[str, str] = {
    "auto": "by the size of the space and the data",
    "allocate": "an exact program on what each option harms",
    "search": "evolution on whole candidates",
    "relax": "masks learned by gradients: differentiable sparsity allocation (Ning et al., 2020)",
    "relax:dsa": "the same",
    "relax:pas": "binary gates (Pruning-as-Search, Li et al., 2022)",
    "relax:bip": "bi-level masks (Zhang et al., 2022)",
}
MIXED = "kinds mixed"  # layers in integers beside layers in float
_SAME = {"relax:dsa": "relax"}  # in studies
_FEW = 64  # candidates that are all judged whole, rather than option by option
_ENOUGH = 32  # images: on a toy, the program chose better on 4 and 16, whole candidates from 64 on
_SEARCH_SHARE = 0.3  # of the time, where a search has only a limit on time
_SPARING = 1e-3  # of a middling harm: what a cut costs that seems to harm nothing
_SLACK = 1.15  # the table may be off: what lies a little beyond a predicted limit is judged too


def chosen(job: Shrinking, solver: str) -> tuple[str, str]:
    """The solver's name and why it was taken.

    Of few candidates each is judged as a whole, which sees what changes do together. The least of
    many noisy numbers is mostly noise, though: harm that is read on a handful of images is told
    option by option, and smoothed along each decision. `relax` is never taken unasked: it needs
    labels, training and widths.
    """
    if solver != "auto":
        return solver, f"asked for: {SOLVERS[solver]}"
    size, images = how_many(job.family.space), job.calibrated.samples
    read, many = f"{images} training examples", f"{size:,.0f}" if size < 1e6 else f"{size:.2g}"
    options = f"{job.options} options of {len(job.family.space)} decisions"
    if size <= _FEW and images >= _ENOUGH:
        return "search", (
            f"{size:.0f} candidates are few enough to judge each as a whole, and {read} are enough "
            "to tell them apart"
        )
    if size <= _FEW:
        return "allocate", (
            f"{size:.0f} candidates are few, but {read} too few to tell them apart as a whole "
            f"({_ENOUGH} would do): {options} are judged one by one and smoothed"
        )
    return "allocate", (
        f"{options} are judged one by one on {read}; {many} candidates are too many to judge each"
    )


def solves_by(job: Shrinking, solver: str) -> dict[str, Solve]:
    """Functions that give the best candidate within limits on predicted costs, by name; where there
    are several, what they find is compared once it is repaired."""
    if solver == "allocate":
        return allocating(job)
    if solver == "search":
        return {solver: searching(job)}
    from espalier.flows.gating import relaxing

    return {solver: relaxing(job, solver)}


# --- allocate ----------------------------------------------------------------------------------


def factors_of(job: Shrinking, metrics: Sequence[str]) -> dict[str, list[Factor]]:
    """The additive tables of costs."""
    return {m: list(cost_factors(job.family, m, _priced(job, m))) for m in metrics}


def _priced(job: Shrinking, metric: str) -> Any:
    found: list[Cost] = [c for c in job.pricing.costs if metric in {m.name for m in c.metrics}]
    return found[0] if found else Counts(job.family)


def allocating(job: Shrinking) -> dict[str, Solve]:
    """The exact program on the harm of every option, under all limits at once; and, where bits are
    decided under a limit on latency, the same with all layers in integers, and with all in float.

    Mixed kinds cost a turn wherever they meet, which makes that program a long one: it begins at the
    better of the other two, which are short, and all three compete once they are repaired.
    """
    others = {}
    if job.latency_limit is not None:
        others = {"all in integers": _but_integers(job), "all in float": _but_float(job)}
    costs = factors_of(job, [x.metric for x in job.limits])
    harm = job.sense().factors  # last: it has what is left of the time that both may take
    alone = {n: program_on(job, [*harm, *f], (), costs) for n, f in others.items() if f}
    return {MIXED: program_on(job, harm, tuple(alone.values()), costs), **alone}


def _but_integers(job: Shrinking) -> list[Factor]:
    """What forbids every choice of bits above the fewest that a kernel computes with."""
    return _forbidden(job, lambda bits, kernels: bits > kernels[0])


def _but_float(job: Shrinking) -> list[Factor]:
    """What forbids integers."""
    return _forbidden(job, lambda bits, kernels: bits < kernels[-1])


def _forbidden(job: Shrinking, rule: Callable[[int, list[int]], bool]) -> list[Factor]:
    """What forbids some bits of every layer, by a rule on them and the bits that kernels have."""
    space = job.family.space
    found = []
    for cut in job.family.cuts:
        if isinstance(cut, BoundBits) and not cut.cut.weights_only:
            options = cut.cut.options
            kernels = [b for b in options if b not in cut.simulated]
            forbidden = np.array([math.inf if rule(b, kernels) else 0.0 for b in options])
            found += [
                Factor((d.name,), forbidden)
                for d in cut.decisions
                if space[d.name].count == len(forbidden)
            ]
    return found


def program_on(
    job: Shrinking,
    harm: Sequence[Factor],
    begun: Sequence[Solve] = (),
    costs: Mapping[str, Sequence[Factor]] | None = None,
) -> Solve:
    """The exact program on any additive harm, within the limits on costs; it begins at the best of
    what was `begun`."""
    if costs is None:
        costs = factors_of(job, [x.metric for x in job.limits])
    told = [*harm, *_sparing(job, harm)]
    found_before: dict[tuple[Limit, ...], Candidate | EspalierError] = {}

    def solve(limits: Sequence[Limit]) -> Candidate:
        """Solved once for the same limits: what another program begins at is asked for again."""
        key = tuple(limits)
        if key not in found_before:
            try:
                found_before[key] = afresh(limits)
            except EspalierError as error:
                found_before[key] = error
        found = found_before[key]
        if isinstance(found, EspalierError):
            raise found
        return found

    def afresh(limits: Sequence[Limit]) -> Candidate:
        program = Program(job.family.space, told, costs, limits)
        hint = _best_of(program, [c for solve in begun if (c := _answer(solve, limits))])
        found = program.solve(seconds=_seconds(job), seed=job.seed, hint=hint)
        job.greedy[found.candidate] = found.harm, _greedily(program)
        return found.candidate

    return solve


def _answer(solve: Solve, limits: Sequence[Limit]) -> Candidate | None:
    """What a way to solve finds; None where that is nothing, or nothing in time."""
    try:
        return solve(limits)
    except EspalierError:
        return None


def _best_of(program: Program, found: Sequence[Candidate]) -> Candidate | None:
    """Of the least harm; None where nothing was found."""
    if not found:
        return None
    harm, _, _ = program.judge(program.space.encode(list(found)))
    return found[int(np.argmin(harm))]


def _greedily(program: Program) -> float:
    """The harm of the baseline, a decision after another by harm saved per cost; inf for none."""
    try:
        return program.greedy().harm
    except BudgetError:
        return math.inf


def _sparing(job: Shrinking, harm: Sequence[Factor]) -> list[Factor]:
    """A very small harm for every step away from the original: what few images show no harm of is
    not cut unless a limit asks for it."""
    values = np.concatenate([f.values.ravel() for f in harm] or [np.zeros(0)])
    seen = values[np.isfinite(values) & (values > 0)]
    least = _SPARING * float(np.median(seen)) if len(seen) else _SPARING
    space = job.family.space
    start = space.encode([job.family.original])[0]
    found = []
    for i, decision in enumerate(space.decisions):
        if decision.count > 1:
            steps = np.abs(np.arange(decision.count) - int(start[i])) / (decision.count - 1)
            found.append(Factor((decision.name,), least * steps))
    return found


def cheapest_program(job: Shrinking, metric: str) -> Candidate:
    """The candidate of the least cost that keeps the limits on the other costs."""
    others = [x for x in job.limits if x.metric != metric]
    costs = factors_of(job, [metric, *(x.metric for x in others)])
    program = Program(job.family.space, costs[metric], costs, others)
    return program.solve(seconds=_seconds(job), seed=job.seed).candidate


def _seconds(job: Shrinking) -> float:
    return 20.0 if job.budget.seconds is None else float(np.clip(job.budget.seconds / 40, 1, 20))


# --- search ------------------------------------------------------------------------------------


def searching(job: Shrinking) -> Solve:
    """Evolution over the space by the harm of whole candidates; all of them where they are few."""
    space = job.family.space
    metric = job.calibrated.metrics[0]
    limits = paced(job, _SLACK)
    few = space.size <= _FEW
    trials = int(space.size) if few else job.budget.trials or 2000
    strategy = strategies.make("random" if few else "nsga2", space, job.seed)
    job.show.phase(f"search: {strategy.name}", trials)
    done = 0

    def on_trial(trial: Trial) -> None:
        nonlocal done
        done += 1
        job.show.step(done, trials)

    share = None if job.budget.seconds is None else _SEARCH_SHARE * job.budget.seconds
    found = job.study.search(
        "search",
        Problem((metric, job.pricing.metrics[job.axis]), limits),
        strategy,
        Score(job.calibrated),
        trials=trials,
        batch=min(trials, 24),
        executor=Serial(),
        price=job.pricing,
        deadline=None if share is None else time.time() + share,
        on_trial=on_trial,
    )
    rows = [t for t in found if t.state == "done"]
    sign = 1.0 if metric.goal == "min" else -1.0
    rows.sort(key=lambda t: (sign * t.metrics[metric.name].value, t.position))
    prices = job.pricing(space.encode([t.candidate for t in rows]))
    return lambda wanted: _first(rows, prices, wanted)


def paced(job: Shrinking, slack: float = 1.0) -> tuple[Limit, ...]:
    """The limits as predictions keep them: the table has a pace of its own."""
    scale = slack * _pace(job)
    return tuple(
        replace(x, bound=x.bound * scale) if x.metric == LATENCY else x for x in job.limits
    )


def _pace(job: Shrinking) -> float:
    """What the table says of the original, as a share of what was measured."""
    if job.predicted is None:
        return 1.0
    predicted = job.price(job.family.original)[LATENCY].value
    return predicted / job.original.metrics[LATENCY].value


def _first(rows: Sequence[Trial], prices: Metrics, limits: Sequence[Limit]) -> Candidate:
    kept = np.flatnonzero(Problem((), tuple(limits)).violations(prices) <= 0)
    if len(kept) == 0:
        raise BudgetError(
            f"the search met no candidate within {', '.join(map(str, limits))}: raise a "
            "limit, or let solver='allocate' find one"
        )
    return rows[int(kept[0])].candidate


# --- what is refused early ---------------------------------------------------------------------


def known_names(solver: str, measure: str) -> str:
    """The solver by the name that studies have for it. Errors: `EspalierError` for an unknown solver
    or measure, naming the nearest.
    """
    if solver not in SOLVERS:
        raise EspalierError(unknown("solver", solver, SOLVERS))
    if measure not in MEASURES:
        raise EspalierError(unknown("measure of harm", measure, MEASURES))
    return _SAME.get(solver, solver)


def check_decided(family: Pretrained, solver: str) -> None:
    """Refuses decisions that the solver can't take, before anything is measured.

    Errors: `MissingExtra` without OR-Tools, which only a search of few candidates gets on without.
    """
    if solver.startswith("relax"):
        from espalier.flows.gating import check_masks

        check_masks(family.space.names, solver)
    elif solver != "search":
        programs()


def check_counted(job: Shrinking) -> None:
    """Refuses limits on counted costs that nothing keeps, before anything dear is done.

    Errors: `BudgetError` with what is reachable.
    """
    counted = [x for x in job.limits if x.metric in job.pricing.metrics]
    if Problem((), tuple(counted)).violations(_priced_rows(job))[0] > 0:
        costs = factors_of(job, [x.metric for x in counted])
        try:
            Program(job.family.space, (), costs, counted).solve(seconds=_seconds(job))
        except BudgetError as error:
            error.args = (f"{error}; raise the limit or {further(job)}",)
            raise


def _priced_rows(job: Shrinking) -> Metrics:
    return job.pricing(job.family.space.encode([job.smallest()]))
