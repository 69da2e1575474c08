"""Brackets of successive halving: rungs that are filled, finished, and cut to the best third."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from espalier.solvers.strategies.fidelity import Job, MultiFidelity
from espalier.solvers.strategies.results import Results
from espalier.space import Space


@dataclass
class Bracket:
    """`size` candidates begin at level `first`; of each rung the best 1 in eta go on.

    `rungs` holds the numbers of the candidates at each level from `first` on. `closed`: no
    candidate is added to the first rung, because the space has no new ones.
    """

    first: int
    size: int
    rungs: list[list[int]] = field(default_factory=lambda: [[]])
    closed: bool = False

    @property
    def level(self) -> int:
        """The level of the last rung."""
        return self.first + len(self.rungs) - 1

    def next(self, results: Results, new: Callable[[], int | None]) -> Job | None:
        """The next row of this bracket; None while it waits for results, and when it is done."""
        if len(self.rungs) == 1:
            # who was refused costs nothing and takes nobody's place
            self.rungs[0] = [i for i in self.rungs[0] if not results.refused(self.first, i)]
        if not self._filled:
            number = new()
            if number is not None:
                self.rungs[0].append(number)
                return number, self.first
            self.closed = True
        waiting = [i for i in self.rungs[-1] if i not in results.asked[self.level]]
        return (waiting[0], self.level) if waiting else None

    def promote(self, results: Results, top: int, eta: int) -> bool:
        """Begins the next rung where the last is finished and has one; whether it did."""
        if self.level == top or not self._finished(results):
            return False
        room = len(self.rungs[0]) // eta ** len(self.rungs)
        members = set(self.rungs[-1])
        best = [i for i in results.best(self.level) if i in members][:room]
        if best:
            self.rungs.append(best)
        return bool(best)

    def done(self, results: Results, top: int, eta: int) -> bool:
        """Whether nothing is left to ask, to promote or to wait for."""
        return self._finished(results) and not self.promote(results, top, eta)

    @property
    def _filled(self) -> bool:
        return self.closed or len(self.rungs) > 1 or len(self.rungs[0]) >= self.size

    def _finished(self, results: Results) -> bool:
        return self._filled and all(i in results.told[self.level] for i in self.rungs[-1])


class Brackets(MultiFidelity):
    """Runs brackets one after the other; where they wait for results, the next is begun early."""

    def __init__(self, space: Space, seed: int = 0, fidelity: str = "epochs", eta: int = 3) -> None:
        super().__init__(space, seed, fidelity, eta)
        self.brackets: list[Bracket] = []  # those that are not done, oldest first
        self.begun = 0

    @abstractmethod
    def plan(self, number: int) -> tuple[int, int]:
        """How many candidates bracket `number` (from 0) begins, and at which level."""

    def _next(self) -> Job | None:
        top, eta, results = self.levels.top, self.eta, self.results
        for bracket in list(self.brackets):
            bracket.promote(results, top, eta)
            job = bracket.next(results, self._new)
            if job is not None:
                return job
            if bracket.done(results, top, eta):
                self.brackets.remove(bracket)
        size, first = self.plan(self.begun)
        bracket = Bracket(first, size)
        job = bracket.next(results, self._new)
        if job is not None:
            self.begun += 1
            self.brackets.append(bracket)
        return job

    def _own_state(self) -> dict[str, Any]:
        return {"begun": self.begun, "brackets": [asdict(b) for b in self.brackets]}

    def _own_load(self, state: dict[str, Any]) -> None:
        self.begun = int(state["begun"])
        self.brackets = [Bracket(**b) for b in state["brackets"]]
