"""A run of a strategy with many workers, in the virtual time of a table.

Deterministic, and the same however fast the machine is (the simulated backend of Syne Tune:
Salinas et al., 2022, is the example).
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from espalier.bench.drive import looked_up
from espalier.bench.told import Told, told
from espalier.bench.trace import Trace
from espalier.errors import EspalierError
from espalier.problem import Limit

if TYPE_CHECKING:
    from espalier.bench.table import Table
    from espalier.solvers.strategies import Strategy

# when it ends, which ask it was, the candidate, its row, values, violation, seconds in all
_Run = tuple[float, int, NDArray[Any], int, NDArray[np.float64], float, float]


def simulate(
    strategy: Strategy,
    table: Table,
    *,
    workers: int,
    queries: int | None = None,
    seconds: float | None = None,
    objectives: Sequence[str] | None = None,
    limits: Iterable[Limit] = (),
    fidelity: str = "epochs",
    seen: Told | None = None,
) -> Trace:
    """Asynchronous workers: a free one asks for one candidate, which is told when its time is over.

    Ends after `queries` candidates, or at `seconds` of virtual time (what has not ended by then is
    not told), or when the strategy has nothing more. A worker for which there is nothing to ask
    waits for the next result. Results of one moment are told in the order they were asked, before
    anyone asks again. In a space with the decision `fidelity`, a candidate that was trained to a
    lower level goes on from there and pays the difference only. `seen` is `told(table, ...)`.
    Errors: `EspalierError` without an end or a worker, and for a candidate that the table lacks.
    """
    if workers < 1:
        raise EspalierError(f"a simulation has at least 1 worker, got {workers}")
    if queries is None and seconds is None:
        raise EspalierError("a simulation ends after queries or seconds: give one of them")
    for name, value in (("queries", queries), ("seconds", seconds)):
        if value is not None and not value > 0:
            raise EspalierError(f"{name} must be above 0, got {value}")
    return _Simulation(
        strategy, table, seen or told(table, objectives, limits), fidelity, workers
    ).run(float("inf") if queries is None else queries, seconds)


class _Simulation:
    def __init__(
        self, strategy: Strategy, table: Table, view: Told, fidelity: str, workers: int
    ) -> None:
        self.strategy, self.table, self.view, self.workers = strategy, table, view, workers
        names = list(table.space.names)
        self.column = names.index(fidelity) if fidelity in names else -1
        self.mean = 1.0 if view.seconds is None else float(np.nanmean(view.seconds))
        self.paid: dict[bytes, float] = {}  # seconds that a candidate was trained for already
        self.running: list[_Run] = []
        self.asked, self.now, self.overhead = 0, 0.0, 0.0

    def run(self, queries: float, seconds: float | None) -> Trace:
        """Until the queries or the seconds are used up."""
        ended: list[_Run] = []
        while True:
            while len(self.running) < self.workers and self.asked < queries:
                if not self._begin():
                    break
            if not self.running or (seconds is not None and self.running[0][0] > seconds):
                break
            self.now = self.running[0][0]
            while self.running and self.running[0][0] == self.now:
                ended.append(heapq.heappop(self.running))
                self._tell(ended[-1])
        if not ended:
            raise EspalierError(
                f"no candidate of {self.table.name} that {self.strategy.name} asked for ended in time"
            )
        return Trace(
            np.array([e[3] for e in ended], dtype=np.int64),
            np.stack([e[4] for e in ended]),
            np.array([e[5] for e in ended]),
            np.array([e[0] for e in ended]),
            self.overhead,
        )

    def _begin(self) -> bool:
        """A free worker asks; whether there was something to ask."""
        start = time.perf_counter()
        codes = self.strategy.ask(1)
        self.overhead += time.perf_counter() - start
        if len(codes) == 0:
            return False
        rows, values, violations = looked_up(self.table, self.view, codes)
        row, known = int(rows[0]), self.view.seconds
        whole = self.mean if row < 0 or known is None else float(known[row])
        ends = self.now + max(whole - self.paid.get(self._candidate(codes), 0.0), 0.0)
        run = (ends, self.asked, codes, row, values[0], float(violations[0]), whole)
        heapq.heappush(self.running, run)
        self.asked += 1
        return True

    def _tell(self, run: _Run) -> None:
        _, _, codes, _, values, violation, whole = run
        key = self._candidate(codes)
        self.paid[key] = max(self.paid.get(key, 0.0), whole)
        start = time.perf_counter()
        self.strategy.tell(codes, values[None], np.array([violation]))
        self.overhead += time.perf_counter() - start

    def _candidate(self, codes: NDArray[Any]) -> bytes:
        """A key of the candidate, at whatever level."""
        return (codes if self.column < 0 else np.delete(codes, self.column, axis=1)).tobytes()
