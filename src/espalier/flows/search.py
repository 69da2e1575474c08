"""The main job: a family, a task and a budget go in, the network that fits comes out."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from espalier import nets, tasks
from espalier.costs import Cost, Counts, OnnxRuntime, PredictedLatency
from espalier.errors import BudgetError, EspalierError, StudyError, unknown
from espalier.estimators import Estimator
from espalier.flows.finalists import select
from espalier.flows.finals import finish
from espalier.flows.found import Found
from espalier.flows.job import Job, MakeStrategy
from espalier.flows.measuring import begun, plain_runtime, study_folder, withdraw
from espalier.flows.plan import Plan
from espalier.flows.pricing import Pricing, check_names, check_reach, resolve
from espalier.flows.progress import Display, Silent
from espalier.flows.relaxing import check as check_relax
from espalier.flows.reuse import take_over
from espalier.nets import Family
from espalier.problem import Limit, Limits, SearchBudget, limits
from espalier.solvers import strategies
from espalier.tasks import Task
from espalier.train import Recipe

FamilyLike = Family | str | Callable[[tuple[int, ...], int], Family]
SOLVERS = ("search", "relax")
_TABLE = 0.25  # of the whole time, for the table of latencies
CostLike = Cost | Callable[[Family], Cost]


def search(
    family: FamilyLike,
    task: Task | str,
    *,
    within: Limits | Sequence[Limit] | None = None,
    on: OnnxRuntime | None = None,
    budget: str | float | SearchBudget = "2min",
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    workers: int = 0,
    strategy: str | MakeStrategy = "nsga2",
    solver: str = "search",
    estimator: Estimator | None = None,
    costs: Sequence[CostLike] = (),
    recipe: Recipe | None = None,
    plan: Plan | None = None,
    reuse: str | Path | None = None,
    progress: Display | None = None,
) -> Found:
    """Finds the network of a family that does a task best within limits measured on a device.

    The flow: what breaks a limit is refused by counted and predicted cost; a supernet is trained
    once (families that share weights) and `strategy` searches on its accuracy; random search gets
    the same trials on the same supernet; the best of both, and the family scaled by hand, are
    measured on the runtime, trained to the end by one recipe, measured again, and tested once.

    - `family`: a family (one with weights starts from the weights it has), its name ("mobilenet", "resnet"), or a callable `(shape, classes)`.
    - `task`: a task, or a name such as "digits" or "cifar10:size=16".
    - `within`: limits, several at once: `{"latency_ms": 0.8, "params": "60k", "macs": "<= 2M"}`.
    - `on`: the runtime that latency is measured on.
    - `budget`: what the search may spend: "2min", "500 trials", or both.
    - `workers`: processes that score and train; 0 works in this one. The result is the same.
    - `plan`: epochs, trials and finalists, where you would rather say them than have the time
      divided for you.
    - `reuse`: the folder of an earlier study of the same family, data and recipe: its supernet and
      its latency table are taken over, and only the search and the final training are paid again.
    - `strategy`: its name, or a callable `(space, seed)` that makes an own one.
    - `solver`: "search" trains the supernet and then lets `strategy` search on it; "relax" trains
      weights and architecture together by gradients, also of the limits, and then draws trials from
      what it learned, the likeliest first. It reuses latency tables, not supernets.
    - `costs`: own costs, or callables that make one from the family.
    - `out`: the study's folder; a new one under `runs/` when absent. `resume` goes on from it.

    Raises `EspalierError` with one line for bad input or a budget that can't be kept. Ctrl-C ends
    cleanly; call again with `resume=True` and the same arguments.
    """
    task = tasks.make(task) if isinstance(task, str) else task
    torch.manual_seed(seed)  # a family that is made here starts from weights that the seed decides
    made = _family(family, task)
    spent = SearchBudget.parse(budget)
    if isinstance(strategy, str) and strategy not in strategies.STRATEGIES:
        strategies.make(strategy, made.space, seed)  # raises, naming the nearest
    if solver not in SOLVERS:
        raise EspalierError(unknown("solver", solver, SOLVERS))
    if solver == "relax":
        check_relax(made, strategy, estimator)
    runtime = on or OnnxRuntime()
    folder = study_folder(out, f"{task.name}-{made.name}", resume)
    show = progress or Silent()
    own = tuple(c if isinstance(c, Cost) else c(made) for c in costs)
    counts = Counts(made)
    asked = limits(within)
    _check_limits(asked, [counts, *own], made, task, seed)
    identity = _identity(made, task, asked, runtime, strategy, estimator, seed)
    if solver != "search":
        identity["solver"] = solver
    settings = {"budget": str(spent), "workers": workers}
    study = begun(folder, identity, settings, seed, resume)
    try:
        with study, show:
            for text in study.notes:
                show.note(text)
            job = Job(
                made, task, asked, runtime, study, strategy, seed, workers, spent,
                recipe or Recipe(), show, own, estimator, plan, solver,
            )  # fmt: skip
            if reuse is not None:
                take_over(job, Path(reuse), identity)
            return _run(job, counts)
    except (BudgetError, StudyError):
        if not resume:
            withdraw(folder)
        raise


def _run(job: Job, counts: Counts) -> Found:
    started = time.time()
    torch.manual_seed(job.seed)
    with job.phase("calibrate"):
        _calibrate(job, counts)
        job.decide_plan()
    with job.phase("supernet"):
        job.train_shared()
    with job.phase("search"):
        searched = job.explore(job.drawn if job.relaxed else job.strategy, "search")
        if not any(t.state == "done" for t in searched):
            raise BudgetError(_none_within(job))
    with job.phase("random"):
        by_chance = job.explore("random", "random")
    with job.phase("final"):
        chosen = select(job, searched, by_chance)
        everyone = list(dict.fromkeys(itertools.chain(*chosen.values())))
        entries = finish(job, everyone)
    return Found.settle(job, chosen, entries, [*searched, *by_chance], time.time() - started)


def _calibrate(job: Job, counts: Counts) -> None:
    """Gives the job its prices and its limits in numbers.

    A limit that no candidate seems to keep is refused only when a second calibration says so too:
    one slow moment of the machine can make a share of the largest unreachable.
    """
    asked = job.limits
    fresh = PredictedLatency(job.family, job.runtime)
    seconds = math.inf if job.budget.seconds is None else _TABLE * job.budget.seconds
    for last, key in enumerate(("latency table", "latency table, again")):
        again = " once more" if last else ""
        job.show.phase(f"calibrating latency on this machine{again}", 1)
        table = job.study.once(
            key,
            lambda: fresh.calibrate(seed=job.seed, progress=job.show.step, seconds=seconds),
        )
        job.predicted = PredictedLatency.from_json(job.family, job.runtime, table)
        job.pricing = Pricing(job.family.space, [counts, job.predicted, *job.own_costs])
        job.limits = resolve(asked, job.pricing)
        try:
            return check_reach(job.limits, job.pricing, job.family.name, job.seed)
        except BudgetError:
            if last:
                raise


def _none_within(job: Job) -> str:
    refused = job.study.refused("search")
    return (
        f"the search found no candidate within {', '.join(map(str, job.limits))} among "
        f"{refused['asked']} that it priced: raise a limit, or give it more trials"
    )


def _family(family: FamilyLike, task: Task) -> Family:
    if isinstance(family, str):
        return nets.make(family, task.shape, task.classes)
    # a Supernet is a family by its shape, not by its class; a class or function still makes one
    ready = hasattr(family, "space") and not isinstance(family, type)
    made: Family = family if ready else family(task.shape, task.classes)  # type: ignore[operator,assignment]
    for ours, theirs, what in (
        (tuple(made.shape), tuple(task.shape), "shape"),
        (made.classes, task.classes, "classes"),
    ):
        if ours != theirs:
            raise EspalierError(
                f"the family's {what} {ours} must be the task's: {task.name} has {theirs}; "
                f"make the family with {what}={theirs}"
            )
    return made


def _check_limits(
    asked: Sequence[Limit], costs: Sequence[Cost], family: Family, task: Task, seed: int
) -> None:
    """Refuses what can be refused before anything is calibrated: names, and counted limits."""
    counted = Pricing(family.space, costs)
    known = {**counted.metrics, **{m.name: m for m in PredictedLatency.metrics}}
    check_names(asked, known, task.metrics)
    others = [x for x in asked if x.metric in counted.metrics]
    if not any(x.relative for x in others):
        check_reach(others, counted, family.name, seed)


def _identity(
    family: Family,
    task: Task,
    asked: Sequence[Limit],
    runtime: OnnxRuntime,
    strategy: str | MakeStrategy,
    estimator: Estimator | None,
    seed: int,
) -> dict[str, Any]:
    """What must be the same when a study is resumed."""
    kind = type(family)
    return {
        "family": f"{kind.__module__}.{kind.__qualname__}",
        "shape": list(family.shape),
        "classes": family.classes,
        "space": family.space.fingerprint,
        "decisions": family.space.to_json(),
        "task": task.name,
        "data": task.fingerprint,
        "limits": [x.exact() for x in asked],
        "runtime": plain_runtime(runtime),
        "strategy": strategy if isinstance(strategy, str) else strategy.__qualname__,
        "estimator": "default" if estimator is None else type(estimator).__qualname__,
        "seed": seed,
    }
