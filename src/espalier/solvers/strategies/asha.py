"""ASHA: a candidate is promoted as soon as it is among the best third of its level so far.

Li, Jamieson, Rostamizadeh, Gonina, Ben-Tzur, Hardt, Recht & Talwalkar, "A System for Massively
Parallel Hyperparameter Tuning" (MLSys 2020), https://arxiv.org/abs/1810.05934. What differs: limits
and several objectives, where the best are those of the first non-dominated fronts.
"""

from __future__ import annotations

from typing import Any

from espalier.solvers.strategies.fidelity import Job, MultiFidelity


class ASHA(MultiFidelity):
    """Asynchronous successive halving: the highest promotion possible, else a new candidate."""

    name = "asha"
    learns = False

    def _next(self) -> Job | None:
        results = self.results
        for level in range(self.levels.top - 1, -1, -1):
            for number in results.best(level)[: results.evaluated[level] // self.eta]:
                if number not in results.asked[level + 1]:
                    return number, level + 1
        new = self._new()
        return None if new is None else (new, 0)

    def _own_state(self) -> dict[str, Any]:
        return {}

    def _own_load(self, state: dict[str, Any]) -> None:
        pass
