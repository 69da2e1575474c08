"""Allocation as a program: the least harm under every limit at once, solved exactly."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.errors import BudgetError, EspalierError, NotInTimeError, unknown
from espalier.problem import Limit
from espalier.solvers.allocate.cpsat import Answer, Model
from espalier.solvers.allocate.factor import Factor, exact
from espalier.solvers.allocate.greedy import greedy
from espalier.solvers.allocate.reason import reason, told
from espalier.solvers.allocate.tables import Tables, Whole, merged, negative, ordered, whole
from espalier.space import Candidate, Real, Space

Array = NDArray[np.float64]
Codes = NDArray[Any]
_OPTIONS = 4096  # of one decision
ROUNDED = 1e-12  # a share of a limit: what a sum of floats may be off by


@dataclass(frozen=True)
class Solution:
    """What a program gave.

    `bound`: no candidate that keeps the limits has less harm. `optimal`: it was proved that none is
    better than `harm` by more than `rounding`, what numbers lost when they were made whole: about
    1e-12 a table of the harm that was known before, by greedy allocation or as the hint (of all
    harm where nothing was); 0 where harms are whole numbers. `by` is "program" or "greedy".
    """

    candidate: Candidate
    harm: float
    costs: dict[str, float]
    bound: float
    optimal: bool
    seconds: float
    rounding: float = 0.0
    by: str = "program"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**vars(self), "candidate": self.candidate.to_json(), "costs": dict(self.costs)}


class Program:
    """The candidate of least harm under limits on costs; harm and costs are sums of factors.

    It is a multiple-choice knapsack with several limits, joint tables, conditional decisions and
    the space's own constraints. Limits are absolute, "<=" or ">="; costs without a limit are only
    told. Errors: `SpaceError` for factors that do not fit the space, `EspalierError` for a real
    decision, `BudgetError` for a limit on what has no factors or that is relative.
    """

    def __init__(
        self,
        space: Space,
        harm: Sequence[Factor],
        costs: Mapping[str, Sequence[Factor]],
        limits: Iterable[Limit] = (),
    ) -> None:
        self.space, self.limits = space, tuple(limits)
        self.harm, self.costs = tuple(harm), {name: tuple(f) for name, f in costs.items()}
        for decision in space.decisions:
            _listed(decision)
        for factor in (*self.harm, *(f for fs in self.costs.values() for f in fs)):
            factor.check(space)
        for limit in self.limits:
            if limit.metric not in self.costs:
                raise BudgetError(unknown("cost for a limit", limit.metric, self.costs))
            if limit.relative or not math.isfinite(limit.bound):
                rule = "a program's limit is a number: resolve it against the original first"
                raise BudgetError(f"{rule}, got {limit}")
        if any(f.peak for f in self.harm):
            raise EspalierError("harm is a sum: a factor of it can't be a peak")
        self.tables = {name: merged(space, _summed(fs)) for name, fs in self.costs.items()}
        self._harm = merged(space, self.harm)
        self._columns = self._stacked()

    # --- reading rows ------------------------------------------------------------------------

    def _stacked(self) -> list[tuple[tuple[int, ...], Array]]:
        """Harm and costs side by side, so that a row is looked up once for all."""
        parts = [self._harm, *self.tables.values()]
        scopes = {scope: t.shape for part in parts for scope, t in part.items()}
        return [
            (scope, np.stack([part.get(scope, np.zeros(shape)) for part in parts], axis=-1))
            for scope, shape in scopes.items()
        ]

    def values(self, codes: Codes) -> tuple[Array, dict[str, Array]]:
        """Harm `(n,)` and each cost `(n,)` of canonical codes `(n, d)`."""
        total = np.zeros((len(codes), 1 + len(self.costs)))
        for scope, table in self._columns:
            total += table[tuple(codes[:, j].astype(np.intp) for j in scope)]
        found = {}
        for i, (name, factors) in enumerate(self.costs.items()):
            column = total[:, 1 + i]
            for factor in factors:
                if factor.peak:
                    column = np.maximum(column, factor.at(self.space, codes))
            found[name] = column
        return total[:, 0], found

    def judge(self, codes: Codes) -> tuple[Array, Array, Array]:
        """Harm, how far beyond the limits, and how much of them is used, each `(n,)`.

        Both are sums of shares of the limits. What is within a rounding of a limit counts as kept.
        """
        harm, costs = self.values(codes)
        over, use = np.zeros(len(codes)), np.zeros(len(codes))
        for limit in self.limits:
            beyond = limit.violation(costs[limit.metric])
            over += np.where(beyond > ROUNDED, beyond, 0.0)
            share = costs[limit.metric] / max(abs(limit.bound), 1e-300)
            use += share if limit.op == "<=" else -share
            over[np.isposinf(costs[limit.metric])] = np.inf
        over[np.isposinf(harm)] = np.inf
        return harm, over, use

    def kept(self, row: Codes) -> bool:
        """Whether a row `(1, d)` is a candidate that keeps every limit, to a rounding (1e-12)."""
        if not self.space.valid(row)[0] or math.isinf(exact(self.space, self.harm, row)):
            return False
        found = [(limit, self.cost(limit.metric, row)) for limit in self.limits]
        return all(math.isfinite(c) and limit.violation(c) <= ROUNDED for limit, c in found)

    def cost(self, name: str, row: Codes) -> float:
        """One cost of a row `(1, d)`."""
        return exact(self.space, self.costs[name], row)

    def _solution(self, row: Codes, bound: float, **about: Any) -> Solution:
        harm = exact(self.space, self.harm, row)
        costs = {name: self.cost(name, row) for name in self.costs}
        (candidate,) = self.space.decode(row)
        return Solution(candidate, harm, costs, min(bound, harm), **about)

    # --- solving -----------------------------------------------------------------------------

    def greedy(self) -> Solution:
        """One decision after another, most harm saved per cost: the baseline.

        Errors: `BudgetError` where that leads to no candidate within the limits.
        """
        start = time.perf_counter()
        row = greedy(self)
        if row is None or not self.kept(row):
            raise BudgetError(
                f"greedy allocation found nothing within {told(self.limits)}; solve()"
            )
        seconds = time.perf_counter() - start
        return self._solution(row, -math.inf, optimal=False, seconds=seconds, by="greedy")

    def solve(
        self,
        seconds: float = 20,
        threads: int = 1,
        seed: int = 0,
        hint: Candidate | None = None,
        forbidden: Sequence[Candidate] = (),
    ) -> Solution:
        """The best candidate, as far as `seconds` allow; `forbidden` ones are not given.

        It begins at `hint`, or where greedy allocation ends. Errors: `BudgetError` where no
        candidate keeps the limits, with the least that is reachable; `NotInTimeError` where none
        was found in time; `MissingExtra` without OR-Tools.
        """
        begin = time.perf_counter()
        refused = list(self.space.encode(list(forbidden)))
        start = self._start(hint, refused)
        known = None if start is None else exact(self.space, self.harm, start)
        harm = whole(self._harm, known)
        model = self.model(self.limits, refused)
        model.minimise(harm)
        if start is not None:
            model.hint(start[0])
        while True:
            left = seconds - (time.perf_counter() - begin)
            answer = model.solve(left, threads, seed)
            if answer.row is None or self.kept(answer.row[None]):
                break
            model.refuse(answer.row)  # it breaks a limit by what was rounded
        row, status = self._better(answer, start), answer.status
        if row is None:
            if status == "infeasible":
                raise BudgetError(reason(self, refused, seconds))
            raise NotInTimeError(
                f"no candidate within {told(self.limits)} was found in {seconds:g} s, nor proved "
                "absent: give the program more seconds"
            )
        about = {"optimal": status == "optimal", "rounding": harm.slack}
        bound = math.floor(answer.bound + 1e-6) if math.isfinite(answer.bound) else 0
        lowest = harm.true(max(bound, 0))
        spent = time.perf_counter() - begin
        by = "program" if answer.row is not None else "greedy"
        return self._solution(row, lowest, seconds=spent, by=by, **about)

    def _start(self, hint: Candidate | None, refused: Sequence[Codes]) -> Codes | None:
        row = greedy(self) if hint is None else self.space.canonical(self.space.encode([hint]))
        if row is None or not self.kept(row):
            return None
        return None if any((row[0] == other).all() for other in refused) else row

    def _better(self, answer: Answer, start: Codes | None) -> Codes | None:
        if answer.row is None or start is None:
            return start if answer.row is None else answer.row[None]
        rows = [answer.row[None], start]
        return min(rows, key=lambda row: exact(self.space, self.harm, row))

    def model(self, limits: Iterable[Limit], refused: Sequence[Codes]) -> Model:
        """The integer program without an objective."""
        model = Model(self.space)
        for limit in limits:
            sums = self._whole(limit)
            model.at_most(sums, limit.bound if limit.op == "<=" else -limit.bound)
            self._keep_peaks(model, limit)
        for row in refused:
            model.refuse(row)
        return model

    def _whole(self, limit: Limit) -> Whole:
        tables: Tables = self.tables[limit.metric]
        return (
            whole(tables, limit.bound)
            if limit.op == "<="
            else whole(negative(tables), -limit.bound)
        )

    def _keep_peaks(self, model: Model, limit: Limit) -> None:
        for factor in self.costs[limit.metric]:
            if factor.peak:
                if limit.op == ">=":
                    raise BudgetError(f"a peak has no least value to keep: {limit}")
                scope, values = ordered(self.space, factor)
                model.exclude({scope: values - limit.bound > ROUNDED * abs(limit.bound)})


def _listed(decision: Any) -> None:
    if isinstance(decision, Real) or decision.count > _OPTIONS:
        rule = f"a program chooses among listed options, at most {_OPTIONS} a decision"
        what = "is real" if isinstance(decision, Real) else f"has {decision.count}"
        raise EspalierError(f"{rule}; {decision.name!r} {what}: use search")


def _summed(factors: Iterable[Factor]) -> list[Factor]:
    return [f for f in factors if not f.peak]
