"""What each strategy of a race runs on: the table, or the table with the epochs as a decision.

A multi-fidelity strategy (successive halving, Hyperband, ASHA, BOHB) stops most trainings early. On a
table with learning curves it gets a decision "epochs", and as many virtual seconds as the other
strategies' queries take on average: then budgets are equal in time. On a table without curves there is
one level, and it is run like every other strategy.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from espalier.bench.curves import with_epochs
from espalier.bench.regret import Judge, judge
from espalier.bench.told import Told, told
from espalier.problem import Limit

if TYPE_CHECKING:
    from espalier.bench.table import Table

FIDELITIES = ("halving", "hyperband", "asha", "bohb")
_ETA = 3


@dataclass(frozen=True)
class Stage:
    """A table as it is run on: what strategies are told, and how their finds are judged.

    `second` is the mean virtual time of a whole training; it is set where the budget is in time.
    """

    table: Table
    view: Told
    second: float | None = None

    @cached_property
    def judge(self) -> Judge:
        """How this table's rows are judged."""
        return judge(self.table, self.view)


def levels(epochs: int, eta: int = _ETA) -> tuple[int, ...]:
    """Epochs at which trainings may stop: the last, a third of it, a ninth, ..., down to 1."""
    out = []
    level = float(epochs)
    while level >= 1:
        out.append(round(level))
        level /= eta
    return tuple(sorted(set(out)))


class Stages:
    """The plain stage of a table, and the one with epochs, made when it is first needed."""

    def __init__(
        self, table: Table, objectives: Iterable[str] = (), limits: Iterable[Limit] = ()
    ) -> None:
        self.objectives, self.limits = tuple(objectives), tuple(limits)
        self.plain = Stage(table, told(table, self.objectives, self.limits))

    @cached_property
    def extended(self) -> Stage | None:
        """With the decision "epochs"; None for a table without learning curves, or without more
        than one level."""
        table = self.plain.table
        curve = table.curves.get(table.validation)
        if curve is None or len(levels(curve.shape[-1])) < 2:
            return None
        longer = with_epochs(table, levels(curve.shape[-1]))
        view = told(longer, self.objectives, self.limits)
        whole = self.plain.view.seconds
        return Stage(longer, view, 1.0 if whole is None else float(np.mean(whole)))

    def of(self, strategy: object) -> Stage:
        """The stage that a strategy is run on, by its name in `STRATEGIES`."""
        if strategy in FIDELITIES and self.extended is not None:
            return self.extended
        return self.plain
