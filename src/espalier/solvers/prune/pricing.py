"""Limits as a gated model can keep them: each with the cost that its gates decide."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from espalier.costs import Counts
from espalier.costs.cost import CodeCost
from espalier.errors import BudgetError
from espalier.problem import Limit, Limits, limits
from espalier.solvers.allocate import Factor
from espalier.solvers.allocate.pricing import cost_factors
from espalier.solvers.prune.budget import Budget, Capped
from espalier.solvers.prune.counted import count_factors
from espalier.solvers.relax.expected import Expected

if TYPE_CHECKING:
    from espalier.compress.gates import Gated


def budgeted(
    gated: Gated, within: Limits | Iterable[Limit], priced: Sequence[CodeCost] = ()
) -> Budget:
    """The limits on a gated family: "50%" is a share of the original's cost.

    Counts are known; `priced` are further costs that add up over pieces, such as a calibrated
    `PredictedLatency`. Errors: `BudgetError` for no limit, one from below, a cost that is not there,
    or one that the smallest model breaks.
    """
    found = limits(within)
    if not found:
        raise BudgetError("gates learn under a limit: give within, such as {'macs': '50%'}")
    family = gated.family
    if family is None:
        raise BudgetError("masks on single weights have no such cost: use sparse_budget")
    costs = [*priced, Counts(family)]
    capped = []
    for limit in found:
        if limit.op != "<=":
            raise BudgetError(f"gates keep limits from above, got {limit}")
        owner = next((c for c in costs if limit.metric in [m.name for m in c.metrics]), None)
        if owner is None:
            known = sorted({m.name for c in costs for m in c.metrics})
            raise BudgetError(f"no cost gives {limit.metric!r}; there are {', '.join(known)}")
        counted = isinstance(owner, Counts)
        factors = (
            count_factors(family, limit.metric)
            if counted
            else cost_factors(family, limit.metric, owner)
        )
        cost = summed(gated, factors)
        whole = float(cost.at({name: gated.space[name].options[-1] for name in gated.mixable}))
        capped.append(Capped(limit.metric, cost, limit.resolve(whole).bound))
    return Budget(gated, capped)


def summed(gated: Gated, factors: Sequence[Factor]) -> Expected:
    """Factors as a cost of what the gates decide; other decisions stay at the original."""
    constant, tables = 0.0, dict[tuple[str, ...], torch.Tensor]()
    for factor in factors:
        if factor.peak or not np.isfinite(factor.values).all():
            raise BudgetError(
                f"gates learn under costs that add up; that of {factor.name or factor.decisions} is a"
                " peak or forbids options: use solver 'allocate'"
            )
        values = factor.values
        for axis in reversed(range(values.ndim)):
            if factor.decisions[axis] not in gated.mixable:
                values = np.asarray(values.take(-1, axis=axis))
        names = tuple(n for n in factor.decisions if n in gated.mixable)
        if not names:
            constant += float(values)
            continue
        table = torch.from_numpy(np.array(values))
        tables[names] = tables[names] + table if names in tables else table
    options = {name: tuple(gated.space[name].options) for name in gated.mixable}
    return Expected(gated.mixable, options, tables, constant)


def sparse_budget(gated: Gated, share: float) -> Budget:
    """At most this share of the masked weights are kept. Errors: `BudgetError`."""
    if not 0 < share <= 1:
        raise BudgetError(f"the share of weights kept must be above 0, at most 1, got {share!r}")
    tables: dict[tuple[str, ...], torch.Tensor] = {
        (n,): torch.tensor(gated.counts[n], dtype=torch.float64) for n in gated.mixable
    }
    options = {name: tuple(gated.space[name].options) for name in gated.mixable}
    cost = Expected(gated.mixable, options, tables)
    whole = sum(gated.units[name] for name in gated.mixable)
    return Budget(gated, [Capped("weights", cost, share * whole)])
