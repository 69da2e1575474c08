"""From trained gates to a candidate within the budget."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from espalier.errors import SpaceError
from espalier.solvers.prune.budget import Budget
from espalier.solvers.prune.gates import UnitGates
from espalier.solvers.relax.state import Selection, SelectionState
from espalier.space import Candidate


class Settled(Selection):
    """The candidate nearest to the shares that the gates keep, at the tightest limit of the budget."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget

    def __call__(self, state: SelectionState) -> Candidate:
        """The candidate; the gated model takes the gates' scores as its order."""
        gates: Any = state.relaxation
        if not isinstance(gates, UnitGates):
            raise SpaceError(
                f"Settled selects from gates on units, got {type(gates).__name__}: use Magnitude"
            )
        with torch.no_grad():
            kept, units = gates.kept(state.logits), state.supernet.units
            shares = np.array([float(kept[n]) / units[n] for n in self.budget.names])
            state.supernet.scores = gates.scores(state.logits)
        return self.budget.settle(shares)
