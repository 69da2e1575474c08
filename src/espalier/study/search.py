"""The loop of a search: ask, price, evaluate, record, tell; killed at any point, it goes on."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.problem import Metrics, Problem, Reading
from espalier.solvers.strategies.strategy import Strategy
from espalier.space import Candidate
from espalier.study.book import Book
from espalier.study.executor import Executor, Pool
from espalier.study.ledger import Ask, NewTrial
from espalier.study.runner import Runner, check_hope, hopeless
from espalier.study.trial import Evaluate, Price, Trial

Codes = NDArray[Any]
Array = NDArray[np.float64]

# Asks in a row that make no trial before a search ends. They cost prices only, and a strategy
# needs some generations to find a small feasible region.
IDLE_ASKS = 100


@dataclass
class Search:
    """One phase of asking a strategy: `run` starts it, or goes on with it."""

    book: Book
    problem: Problem
    strategy: Strategy
    evaluate: Evaluate
    trials: int
    batch: int
    executor: Executor
    price: Price | None
    runner: Runner
    _read: tuple[Ask, NDArray[np.int64], list[Candidate]] | None = field(default=None, init=False)

    def run(self) -> None:
        """Asks until the trials, the time, the space or the patience are used up."""
        full = len(self.book.ended) >= self.trials and not hopeless(self.book, self.trials)
        if self.book.stopped or full:
            return
        with self.executor.open(self.evaluate) as pool:
            self._loop(pool)

    def _loop(self, pool: Pool) -> None:
        ask = self._resumed()
        while ask is not None:
            self.runner.run(pool)
            check_hope(self.book, self.trials)
            # a last ask that was cut short is not told: a resume with more trials completes it
            if self._stopped() or self._unmade(ask):
                return
            self._tell(ask)
            ask = self._ask()

    @property
    def _room(self) -> int:
        return max(self.trials - len(self.book), 0)

    def _stopped(self) -> bool:
        """Whether the deadline ends the phase; the decision is recorded, so a resume keeps it."""
        if self.runner.late and len(self.book.ended) < self.trials:
            self.book.stop("deadline")
        return self.book.stopped

    def _resumed(self) -> Ask | None:
        """The newest ask, with the strategy as it was after it; where there is none, a first."""
        ask = self.book.ledger.last_ask(self.book.phase)
        if ask is None:
            return self._ask()
        self.strategy.load(ask.state)
        if hopeless(self.book, self.trials):
            self.book.again(ask.id)  # the user's code may have been mended
        unmade = self._unmade(ask)[: self._room]
        if unmade:
            prices = self._price(self.strategy.space.encode(unmade))
            rows = prices.readings() if prices is not None else [{}] * len(unmade)
            self.book.add_trials(
                ask.id, [NewTrial(*pair) for pair in zip(unmade, rows, strict=True)]
            )
        return ask

    def _ask(self) -> Ask | None:
        """Asks, prices and records; None when the search has ended."""
        if self._room == 0 or self.book.idle_asks >= IDLE_ASKS or self._stopped():
            return None
        codes = self.strategy.ask(self.batch)
        if len(codes) == 0:
            return None
        prices = self._price(codes)
        violations = np.zeros(len(codes)) if prices is None else self.problem.violations(prices)
        ask = Ask(
            codes.tolist(),
            violations.tolist(),
            self._refused(prices, violations),
            self.strategy.state(),
        )
        unmade = self._unmade(ask)[: self._room]
        rows = {} if prices is None else self._rows(codes, prices)
        new = [NewTrial(c, rows.get(c, {})) for c in unmade]
        self.book.add_ask(self.strategy.name, ask, new)
        return ask

    def _price(self, codes: Codes) -> Metrics | None:
        return self.price(codes) if self.price is not None else None

    def _rows(self, codes: Codes, prices: Metrics) -> dict[Candidate, dict[str, Reading]]:
        return dict(zip(self.strategy.space.decode(codes), prices.readings(), strict=True))

    def _kept(self, ask: Ask) -> tuple[NDArray[np.int64], list[Candidate]]:
        """The rows of an ask that were not refused, and their candidates."""
        if self._read is None or self._read[0] is not ask:
            rows = np.flatnonzero(np.asarray(ask.violations) <= 0)
            candidates = self.strategy.space.decode(self._array(ask.codes)[rows])
            self._read = ask, rows, candidates
        return self._read[1:]

    def _unmade(self, ask: Ask) -> list[Candidate]:
        """Candidates that were not refused and have no trial in this phase, each once."""
        return [c for c in dict.fromkeys(self._kept(ask)[1]) if c not in self.book]

    def _refused(self, prices: Metrics | None, violations: Array) -> dict[str, Any]:
        """One summary of an ask's refused rows: how many, and how many broke each limit."""
        by: Counter[str] = Counter()
        for limit in self.problem.limits:
            if prices is not None and limit.metric in prices:
                by[str(limit)] = int((limit.violation(prices[limit.metric]) > 0).sum())
        return {"asked": len(violations), "refused": int((violations > 0).sum()), "by": dict(by)}

    def _tell(self, ask: Ask) -> None:
        """Tells every row of an ask, in the order asked; a candidate asked again, as it was."""
        codes = self._array(ask.codes)
        violations = np.array(ask.violations, dtype=float)
        values = np.full((len(codes), len(self.problem.objectives)), np.nan)
        for i, candidate in zip(*self._kept(ask), strict=True):
            trial = self.book[candidate]
            if trial.state == "done":
                values[i] = self._values(trial)
                violations[i] = trial.violation
        self.strategy.tell(codes, values, violations)

    def _values(self, trial: Trial) -> list[float]:
        return [
            trial.metrics[o.name].value * (1.0 if o.goal == "min" else -1.0)
            for o in self.problem.objectives
        ]

    def _array(self, codes: list[list[float]]) -> Codes:
        space = self.strategy.space
        return np.array(codes, dtype=space.dtype).reshape(len(codes), len(space))
