"""The integer program: one variable an option, one a combination where options decide jointly."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.errors import EspalierError, MissingExtra
from espalier.solvers.allocate.tables import Scope, Whole
from espalier.space import Forbid, Linear, Space

_MOST = 200_000  # combinations of one table
_COMPLETED, _ALL_COMPLETED = 1.0, 10.0  # seconds to complete a row in, and all of them


@dataclass(frozen=True)
class Answer:
    """What came out: "optimal", "feasible", "infeasible" or "unknown", a row, a bound."""

    status: str
    row: NDArray[Any] | None
    bound: float


class Model:
    """Rows of a space as an integer program for CP-SAT (Perron & Furnon, OR-Tools).

    Each row of variables is a canonical row of codes: conditions and constraints of the space hold.
    Tables of several decisions are joined by one variable a combination, whose sums are the
    decisions' own: the relaxation to real numbers is then as tight as that of a transport problem.
    """

    def __init__(self, space: Space) -> None:
        self.space = space
        self._cp = programs()
        self._model = self._cp.CpModel()
        self._options = [
            [self._model.new_bool_var(f"{d.name}={i}") for i in range(d.count)]
            for d in space.decisions
        ]
        for variables in self._options:
            self._model.add_exactly_one(variables)
        self._joint: dict[Scope, NDArray[Any]] = {}
        self._active = self._gates()
        for constraint in space.constraints:
            self._constrain(constraint)

    # --- the space's own rules ---------------------------------------------------------------

    def _gates(self) -> list[Any]:
        """For each column a literal: it is active; None where it always is."""
        index = {name: j for j, name in enumerate(self.space.names)}
        found: dict[int, Any] = {}

        def literal(j: int) -> Any:
            decision = self.space.decisions[j]
            if j in found or not decision.when:
                return found.get(j)
            needs = []
            for name, allowed in decision.when.items():
                parent = self.space[name]
                within = {int(parent.code(option)) for option in allowed}
                outside = [v for i, v in enumerate(self._options[index[name]]) if i not in within]
                needs += [v.negated() for v in outside]
                above = literal(index[name])
                needs += [] if above is None else [above]
            active = self._model.new_bool_var(f"active {decision.name}")
            self._model.add_bool_and(needs).only_enforce_if(active)
            self._model.add_bool_or([*(n.negated() for n in needs), active])
            # an inactive decision stands at its first option
            self._model.add_bool_or([active, self._options[j][0]])
            found[j] = active
            return active

        return [literal(j) for j in range(len(self.space))]

    def _constrain(self, constraint: Any) -> None:
        index = {name: j for j, name in enumerate(self.space.names)}
        where = [index[name] for name in constraint.names]
        gates = [self._active[j] for j in where if self._active[j] is not None]
        if isinstance(constraint, Forbid):
            chosen = [
                self._options[j][int(self.space.decisions[j].code(option))]
                for j, option in zip(where, constraint.options.values(), strict=True)
            ]
            self._model.add_bool_or([v.negated() for v in (*chosen, *gates)])
            return
        assert isinstance(constraint, Linear)
        sign = 1.0 if constraint.op == "<=" else -1.0
        scale = sum(
            abs(c) * max(abs(float(o)) for o in self.space.decisions[j].options)
            for j, c in zip(where, constraint.coefficients.values(), strict=True)
        )
        step = 2.0 ** np.floor(40 - np.log2(max(scale + abs(constraint.bound), 1e-300)))
        variables, numbers = [], []
        for j, c in zip(where, constraint.coefficients.values(), strict=True):
            variables += self._options[j]
            numbers += [
                int(np.floor(sign * c * float(o) * step)) for o in self.space.decisions[j].options
            ]
        # rounded down, as costs are: a row that breaks it by a rounding is refused afterwards
        limit = int(np.floor(sign * constraint.bound * step)) + 2
        kept = self._model.add(self._cp.LinearExpr.weighted_sum(variables, numbers) <= limit)
        if gates:
            kept.only_enforce_if(gates)

    # --- sums ----------------------------------------------------------------------------------

    def variables(self, scope: Scope) -> list[Any]:
        """A variable for each combination of options, flat; exactly one of them is 1."""
        if len(scope) == 1:
            return self._options[scope[0]]
        if scope not in self._joint:
            self._joint[scope] = self._joined(scope)
        found: list[Any] = self._joint[scope].ravel().tolist()
        return found

    def _joined(self, scope: Scope) -> NDArray[Any]:
        shape = tuple(len(self._options[j]) for j in scope)
        if np.prod(shape, dtype=float) > _MOST:
            names = ", ".join(self.space.names[j] for j in scope)
            rule = f"a table of a program has at most {_MOST:,} combinations"
            raise EspalierError(f"{rule}, that of {names} has {np.prod(shape, dtype=float):,.0f}")
        out = np.empty(shape, dtype=object)
        for place in product(*(range(n) for n in shape)):
            out[place] = self._model.new_bool_var("")
        for axis, j in enumerate(scope):
            for option, variable in enumerate(self._options[j]):
                self._model.add(sum(out.take(option, axis=axis).ravel().tolist()) == variable)
        return out

    def total(self, sums: Whole) -> Any:
        """The sum of whole tables; what they forbid is forbidden."""
        self.exclude(sums.forbidden)
        variables: list[Any] = []
        numbers: list[int] = []
        for scope, table in sums.tables.items():
            if scope:
                variables += self.variables(scope)
                numbers += table.ravel().tolist()
        return self._cp.LinearExpr.weighted_sum(variables, numbers)

    def exclude(self, forbidden: dict[Scope, NDArray[np.bool_]]) -> None:
        """Forbids combinations."""
        for scope, mask in forbidden.items():
            if not scope:
                if mask.any():
                    self._model.add_bool_or([])  # nothing is allowed
                continue
            for variable, out in zip(self.variables(scope), mask.ravel().tolist(), strict=True):
                if out:
                    self._model.add(variable == 0)

    def at_most(self, sums: Whole, limit: float) -> None:
        """Every row whose true sum keeps the limit stays; some that break it by a rounding too."""
        self._model.add(self.total(sums) <= sums.bound(limit + 1e-12 * abs(limit)))

    def refuse(self, row: NDArray[Any]) -> None:
        """No row but this."""
        chosen = [self._options[j][int(code)] for j, code in enumerate(row)]
        self._model.add_bool_or([v.negated() for v in chosen])

    # --- solving -------------------------------------------------------------------------------

    def minimise(self, sums: Whole) -> None:
        """The objective."""
        self._model.minimize(self.total(sums))

    def hint(self, row: NDArray[Any]) -> None:
        """A row to begin with."""
        self._model.clear_hints()
        for j, code in enumerate(row):
            for option, variable in enumerate(self._options[j]):
                self._model.add_hint(variable, option == int(code))
        for scope, joint in self._joint.items():
            place = tuple(int(row[j]) for j in scope)
            for index, variable in np.ndenumerate(joint):
                self._model.add_hint(variable, index == place)

    def solve(self, seconds: float, threads: int, seed: int) -> Answer:
        """Runs the solver for at most so long."""
        solver = self._cp.CpSolver()
        solver.parameters.max_time_in_seconds = max(seconds, 0.01)
        solver.parameters.num_workers = threads
        solver.parameters.random_seed = seed % 2**31
        # this step of presolve adds coefficients up in 32 bits, and then calls worse rows optimal:
        # github.com/google/or-tools/issues/5293
        solver.parameters.presolve_inclusion_work_limit = 0
        status = solver.status_name(solver.solve(self._model)).lower()
        if status == "model_invalid":
            raise EspalierError(f"the program can't be read: {self._model.validate()}")
        if status not in ("optimal", "feasible"):
            return Answer(status, None, solver.best_objective_bound)
        return Answer(status, self._row(solver), solver.best_objective_bound)

    def completed(self, where: Sequence[int], codes: NDArray[Any]) -> NDArray[Any]:
        """A valid row for each row of codes in some columns; where none is found in time, zeros."""
        solver = self._cp.CpSolver()
        solver.parameters.num_workers, solver.parameters.max_time_in_seconds = 1, _COMPLETED
        solver.parameters.presolve_inclusion_work_limit = 0  # as in solve
        until = time.monotonic() + _ALL_COMPLETED
        out = np.zeros((len(codes), len(self.space)), dtype=self.space.dtype)
        for row, wanted in zip(out, codes.tolist(), strict=True):
            if time.monotonic() > until:
                break
            self._model.clear_assumptions()
            self._model.add_assumptions(
                [self._options[j][int(code)] for j, code in zip(where, wanted, strict=True)]
            )
            if solver.status_name(solver.solve(self._model)).lower() in ("optimal", "feasible"):
                row[:] = self._row(solver)
        self._model.clear_assumptions()
        return out

    def _row(self, solver: Any) -> NDArray[Any]:
        codes = [
            next(i for i, variable in enumerate(options) if solver.boolean_value(variable))
            for options in self._options
        ]
        return np.array(codes).astype(self.space.dtype)


def programs() -> Any:
    """OR-Tools' module of programs. Errors: `MissingExtra` where it is not installed."""
    try:
        from ortools.sat.python import cp_model
    except ImportError as error:
        raise MissingExtra("ortools", "compress") from error
    return cp_model
