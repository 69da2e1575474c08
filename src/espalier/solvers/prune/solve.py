"""Pruning by gradient: gates on a trained model learn with its weights, under a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from espalier.solvers.prune.budget import Budget
from espalier.solvers.prune.gates import UnitGates
from espalier.solvers.prune.selection import Settled
from espalier.solvers.relax import Relaxed, Rule, Settings, Term, relax
from espalier.space import Candidate
from espalier.tasks import Task
from espalier.train.loop import Progress

if TYPE_CHECKING:
    from espalier.compress.gates import Gated


@dataclass(frozen=True)
class Pruned:
    """What gates chose, and the model as they left it.

    `scores`: how much each unit matters, by decision: the first ones in their order are kept. `gated`
    runs the candidate by masks, with the weights that learned beside them; the model in it has all of
    its units still. `costs`: of the candidate, by the budget's tables. `history` and `monitor` are
    those of `solvers.relax`.
    """

    candidate: Candidate
    scores: dict[str, Tensor] = field(repr=False)
    gated: Gated = field(repr=False)
    costs: dict[str, float]
    history: list[dict[str, Any]] = field(repr=False)
    monitor: dict[str, Any]
    seconds: float

    @property
    def model(self) -> nn.Module:
        """The trained model without its masks, nothing cut."""
        return self.gated.model

    def network(self) -> nn.Module:
        """The candidate as a plain network, with the weights that learned beside the gates."""
        return self.gated.network()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, without scores and weights."""
        return {
            "candidate": self.candidate.to_json(),
            "costs": dict(self.costs),
            "history": [dict(row) for row in self.history],
            "monitor": dict(self.monitor),
            "seconds": self.seconds,
        }


def prune(
    gated: Gated,
    task: Task,
    budget: Budget,
    gates: UnitGates,
    *,
    rule: Rule,
    terms: Sequence[Term] = (),
    settings: Settings | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> Pruned:
    """Trains a gated model in place and settles on a candidate that keeps every limit.

    The loop is that of `relax`; its slots hold gates on units, a rule, terms of the loss. With a
    `checkpoint` path, a run that was killed goes on from its last epoch, to the same bits.
    Errors: as of `relax`.
    """
    found: Relaxed = relax(
        gated,
        task,
        relaxation=gates,
        rule=rule,
        terms=terms,
        selection=Settled(budget),
        settings=settings,
        seed=seed,
        checkpoint=checkpoint,
        progress=progress,
    )
    return Pruned(
        found.candidate,
        dict(gated.scores),
        gated,
        costs_of(budget, gated, found.candidate),
        found.history,
        found.monitor,
        found.seconds,
    )


def costs_of(budget: Budget, gated: Gated, candidate: Mapping[str, Any]) -> dict[str, float]:
    """What a candidate costs by the budget's tables, by the limits' names."""
    kept = [gated.kept(name, candidate.get(name)) / gated.units[name] for name in budget.names]
    found = budget.costs(np.array(kept))
    return {one.name: cost for one, cost in zip(budget.capped, found, strict=True)}
