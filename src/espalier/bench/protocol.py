"""The protocol: every strategy on one table at equal budget, many seeds, against random search.

What is best so far is chosen by the validation column, and its test column is reported, always.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier.bench.drive import drive
from espalier.bench.entrants import Entrant, check, entrants
from espalier.bench.record import Key, Record, fingerprint
from espalier.bench.scored import scored
from espalier.bench.stages import Stages
from espalier.bench.trace import Trace
from espalier.bench.virtual import simulate
from espalier.errors import EspalierError
from espalier.problem import Limit, limits
from espalier.study.threads import ONE_THREAD, limit_torch

if TYPE_CHECKING:
    from espalier.bench.table import Table

# what is done, how many runs are done, of how many
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Settings:
    """What every run of a race has in common: queries, batch size, simulated workers (0: one query
    after the other), objectives and limits."""

    queries: int
    batch: int = 1
    workers: int = 0
    objectives: tuple[str, ...] = ()
    limits: tuple[Limit, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "queries": self.queries,
            "batch": self.batch,
            "workers": self.workers,
            "objectives": list(self.objectives),
            "limits": [str(limit) for limit in self.limits],
        }


@dataclass(frozen=True)
class Race:
    """What came out: for every strategy the runs of all seeds, and all that is read off them."""

    table: Table
    settings: Settings
    seeds: tuple[int, ...]
    runs: Mapping[str, Sequence[Trace]]
    strategies: Mapping[str, object]

    @cached_property
    def result(self) -> dict[str, Any]:
        """The scores, computed once: see `to_json`."""
        stages = Stages(self.table, self.settings.objectives, self.settings.limits)
        on = {name: stages.of(strategy) for name, strategy in self.strategies.items()}
        workers = max(self.settings.workers, 1)
        found = scored(stages.plain, on, self.runs, self.seeds, self.settings.queries, workers)
        return {
            "table": self.table.name,
            "source": self.table.source,
            **self.settings.to_json(),
            "limits": [
                {"metric": x.metric, "op": x.op, "bound": x.bound} for x in self.settings.limits
            ],
            "seeds": len(self.seeds),
            **found,
        }

    def to_json(self) -> dict[str, Any]:
        """Plain JSON: `regret` (strategy to the mean test regret at the last query), `curves`,
        `ranks`, `significance`, `improvement`, `verdicts` and more; `hypervolume` is empty with
        one objective. Without times of this machine it hangs on the seeds alone."""
        return dict(self.result)


def race(
    table: Table,
    given: str | Iterable[str | Entrant],
    queries: int,
    seeds: int | Sequence[int],
    *,
    batch: int = 1,
    workers: int = 0,
    objectives: Sequence[str] | None = None,
    within: Mapping[str, str | float | int] | Iterable[Limit] | None = None,
    jobs: int = 1,
    out: Path | str | None = None,
    progress: Progress | None = None,
) -> Race:
    """Runs every strategy with every seed on a table, and scores them alike.

    - `given`: "random,evolution:population=30,guided", or a list of names and `Entrant`s. Random
      search is added where it is missing.
    - `queries`: of every run. `batch`: candidates asked at a time. `workers`: simulated workers in
      virtual time; 0 is one query after the other.
    - `objectives`: metrics of the table, by default what the table chooses by. `within`: limits.
    - `jobs`: processes, one thread each; results do not depend on it.
    - `out`: a folder whose `runs.jsonl` keeps every finished run; the same call goes on from it.

    Errors: `EspalierError` for an unknown strategy, option or metric, and for an objective or limit
    that is of test, before anything runs.
    """
    bounds = limits(within)
    stages = Stages(table, tuple(objectives or (table.validation,)), bounds)
    problem = stages.plain.view.problem
    _check_test(table, [*stages.plain.view.names, *(limit.metric for limit in problem.limits)])
    settings = Settings(queries, batch, workers, stages.plain.view.names, problem.limits)
    for name, value, least in (("queries", queries, 1), ("jobs", jobs, 1), ("batch", batch, 1)):
        if value < least:
            raise EspalierError(f"{name} is at least {least}, got {value}")
    if workers < 0:
        raise EspalierError(f"workers is at least 0, got {workers}")
    numbers = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not numbers:
        raise EspalierError(f"a race has at least 1 seed, got {seeds!r}")
    if len(set(numbers)) < len(numbers):
        raise EspalierError(
            f"every seed is given once, for runs must be independent, got {seeds!r}"
        )
    racing = entrants(given)
    check(racing, table, settings.limits)
    about = {"table": table.name, "data": fingerprint(table), **settings.to_json()}
    named = {e.name: e.about for e in racing}
    record = Record(about, None if out is None else Path(out), named)
    todo = [(e, s) for s in numbers for e in racing if (e.name, s) not in record.done]
    total = len(numbers) * len(racing)
    tell = progress or _silent
    tell("", total - len(todo), total)
    run = _run_here if jobs == 1 or len(todo) < 2 else _run_processes
    for n, (key, trace) in enumerate(run(table, settings, todo, jobs), total - len(todo) + 1):
        record.add(key, trace)
        tell(f"{key[0]}, seed {key[1]}", n, total)
    runs = {e.name: [record.done[(e.name, s)] for s in numbers] for e in racing}
    strategies = {e.name: e.strategy for e in racing}
    return Race(table, settings, numbers, runs, strategies)


def _check_test(table: Table, names: Iterable[str]) -> None:
    """What is of test reports; nothing is searched or limited by it."""
    for name in names:
        if table.about[name].split == "test" and name != table.validation:
            raise EspalierError(
                f"{name} is of test, which reports and never chooses: take {table.validation}"
            )


def _silent(what: str, done: int, total: int) -> None:
    return None


def one(stages: Stages, settings: Settings, entrant: Entrant, seed: int) -> Trace:
    """One strategy with one seed."""
    stage = stages.of(entrant.strategy)
    strategy = entrant.make(stage.table, seed, settings.limits)
    if stage.second is not None:
        workers = max(settings.workers, 1)
        seconds = settings.queries * stage.second / workers
        return simulate(strategy, stage.table, workers=workers, seconds=seconds, seen=stage.view)
    if settings.workers:
        return simulate(
            strategy,
            stage.table,
            workers=settings.workers,
            queries=settings.queries,
            seen=stage.view,
        )
    return drive(strategy, stage.table, settings.queries, batch=settings.batch, seen=stage.view)


Todo = Sequence[tuple[Entrant, int]]


def _run_here(
    table: Table, settings: Settings, todo: Todo, jobs: int
) -> Iterator[tuple[Key, Trace]]:
    stages = Stages(table, settings.objectives, settings.limits)
    for entrant, seed in todo:
        yield (entrant.name, seed), one(stages, settings, entrant, seed)


def _run_processes(
    table: Table, settings: Settings, todo: Todo, jobs: int
) -> Iterator[tuple[Key, Trace]]:
    """Fresh interpreters, one thread each; the table is sent once to each."""
    with (
        _environment(ONE_THREAD),
        ProcessPoolExecutor(
            min(jobs, len(todo)), get_context("spawn"), _prepare, (table, settings)
        ) as pool,
    ):
        keys: dict[Future[Trace], Key] = {}
        for entrant, seed in todo:
            keys[pool.submit(_one_there, entrant, seed)] = (entrant.name, seed)
        try:
            waiting = set(keys)
            while waiting:
                finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield keys[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_there: dict[str, Any] = {}


def _prepare(table: Table, settings: Settings) -> None:
    limit_torch()
    _there.update(stages=Stages(table, settings.objectives, settings.limits), settings=settings)


def _one_there(entrant: Entrant, seed: int) -> Trace:
    limit_torch()
    return one(_there["stages"], _there["settings"], entrant, seed)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {k: os.environ.get(k) for k in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
