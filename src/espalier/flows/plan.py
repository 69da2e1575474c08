"""How a search spends the time it was given; decided once from measured speeds, then recorded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from espalier.problem import SearchBudget

# Shares of the time that is left after calibration. Training to the end gets the most: it decides
# the accuracy that the user sees, for the finalists and for the baselines alike.
_SUPERNET, _SEARCH, _FINAL = 0.36, 0.16, 0.48
_FIXED_SECONDS = 14.0  # workers that start, measuring, export, report


@dataclass(frozen=True)
class Plan:
    """Epochs of the supernet, trials and batch of the search, finalists and their epochs."""

    supernet_epochs: int
    trials: int
    population: int
    finalists: int
    final_epochs: int

    def to_json(self) -> dict[str, Any]:
        """The plan as plain JSON."""
        return asdict(self)


def _clamp(value: float, low: int, high: int) -> int:
    return int(min(max(value, low), high))


def make_plan(
    budget: SearchBudget, spent: float, speed: Mapping[str, float], workers: int, shared: bool
) -> Plan:
    """Divides the budget. `speed` has seconds: supernet_epoch, trial, final_epoch.

    Without a time limit the epochs are defaults; without a trial limit the time decides. `shared`
    says whether the family shares weights (each finalist then starts twice: from the supernet and
    from scratch). A plan never has less than a few epochs, so a very short budget is exceeded.
    """
    lanes = max(workers, 1)
    starts = 2 if shared else 1
    if budget.seconds is None:
        trials = budget.trials or 256
        return Plan(30 if shared else 0, trials, _population(trials), 3, 25)
    left = max(budget.seconds - spent - _FIXED_SECONDS, 5.0)
    shares = (_SUPERNET, _SEARCH, _FINAL) if shared else (0.0, 0.5, 0.5)
    supernet = _clamp(shares[0] * left / speed["supernet_epoch"], 4, 150) if shared else 0
    # the same number of trials goes to random search, the baseline
    trials = budget.trials or _clamp(shares[1] * left * lanes / (2 * speed["trial"]), 32, 1000)
    finalists = 2 if left < 90 else 3 if left < 400 else 5
    trainings = starts * (finalists + 2)
    rounds = -(-trainings // lanes)
    final = _clamp(shares[2] * left / (rounds * speed["final_epoch"]), 4, 100)
    return Plan(supernet, trials, _population(trials), finalists, final)


def fit_epochs(
    plan: Plan, left: float, slower: float, speed: Mapping[str, float], lanes: int, trainings: int
) -> int:
    """Epochs of the final trainings in the time that is left, never more than planned.

    `slower` is how much longer the supernet took than was planned: the machine is busier now than
    when its speed was measured.
    """
    rounds = -(-trainings // max(lanes, 1))
    return _clamp(left / (rounds * speed["final_epoch"] * max(slower, 1.0)), 3, plan.final_epochs)


def _population(trials: int) -> int:
    """A batch that leaves the strategy at least six generations, between 8 and 50."""
    return _clamp(trials // 8, 8, 50)
