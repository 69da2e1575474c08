"""pymoo's genetic algorithm for mixed variables as a peer: ga, and nsga2 by its survival."""

from __future__ import annotations

import numpy as np
from pymoo.algorithms.moo.nsga2 import RankAndCrowding
from pymoo.core.evaluator import Evaluator
from pymoo.core.mixed import MixedVariableGA
from pymoo.core.problem import Problem
from pymoo.core.variable import Choice, Integer
from pymoo.problems.static import StaticProblem
from pymoo.termination import get_termination
from serve import serve


class Run:
    def __init__(
        self, counts: list[int], kinds: list[str], objectives: int, seed: int, method: str
    ) -> None:
        self.names = [f"x{i}" for i in range(len(counts))]
        variables = {
            name: Integer(bounds=(0, n - 1))
            if kind == "ordinal"
            else Choice(options=list(range(n)))
            for name, n, kind in zip(self.names, counts, kinds, strict=True)
        }
        self.problem = Problem(vars=variables, n_obj=objectives)
        more = {"survival": RankAndCrowding()} if method == "nsga2" else {}
        self.algorithm = MixedVariableGA(pop_size=20, **more)
        self.algorithm.setup(
            self.problem, termination=get_termination("n_gen", 10**9), seed=seed, verbose=False
        )

    def ask(self) -> list[list[int]]:
        self.rows = self.algorithm.ask()
        return [[row[name] for name in self.names] for row in self.rows.get("X")]

    def tell(self, values: list[list[float]]) -> None:
        known = StaticProblem(self.problem, F=np.array(values))
        Evaluator().eval(known, self.rows)
        self.algorithm.tell(infills=self.rows)


if __name__ == "__main__":
    serve(Run)
