"""Published ways to prune by gradient: each a choice of gates, rule, terms and settings."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from espalier.compress.gates import Gated
from espalier.compress.gating import unit_gates, weight_gates
from espalier.costs.cost import CodeCost
from espalier.problem import Limit, Limits
from espalier.solvers.prune.binary import BinaryUnits
from espalier.solvers.prune.pricing import budgeted, sparse_budget
from espalier.solvers.prune.rules import Descent
from espalier.solvers.prune.soft import SoftThreshold
from espalier.solvers.prune.solve import Pruned, prune
from espalier.solvers.prune.terms import Consensus, Narrowing, Original
from espalier.solvers.prune.topk import TopUnits
from espalier.solvers.relax import FirstOrder, Settings, Term
from espalier.tasks import Task
from espalier.train.loop import Progress, steps_of
from espalier.train.schedules import linear

if TYPE_CHECKING:
    from espalier.compress.pretrained import Pretrained

Within = Limits | Iterable[Limit]

_TRAVEL, _FASTEST = 4.0, 0.1  # of gates that go from 1 to 0: in all, in a step
_HARDER = 5.0  # the pressure in the end, so that gates end where they are asked to

# a trained model learns on: slower than from the start, and its architecture faster than DARTS's
SETTINGS = Settings(
    epochs=10, lr=0.02, lr_min=0.0, arch_lr=0.01, arch_betas=(0.9, 0.999), arch_decay=0.0
)


def dsa(
    family: Pretrained | Gated,
    task: Task,
    within: Within,
    *,
    priced: Sequence[CodeCost] = (),
    pull: float = 1.0,
    distil: float = 0.0,
    settings: Settings = SETTINGS,
    seed: int = 0,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> Pruned:
    """Differentiable sparsity allocation: a keep ratio a group, learned with the weights.

    Ratios begin at the nearest ones to the whole model within the limits, and move by the loss of a
    part of train, drawn to the limits by ADMM with `pull`. `distil`: the original's share in the
    loss. `within`, `priced`: as of `budgeted`. Also from fresh weights, as both learn at once. A model
    gated by hand is taken as it is, and trained in place.
    Source: Ning et al., DSA: More Efficient Budgeted Pruning via Differentiable Sparsity Allocation,
    ECCV 2020. Errors: `BudgetError`, and as of `relax`.
    """
    gated = _gated(family)
    budget = budgeted(gated, within, priced)
    begin = budget.project(np.ones(len(budget.names)))
    return prune(
        gated,
        task,
        budget,
        SoftThreshold(dict(zip(budget.names, begin.tolist(), strict=True))),
        rule=FirstOrder(),
        terms=[Consensus(budget, pull), *_taught(gated, distil)],
        settings=settings,
        seed=seed,
        checkpoint=checkpoint,
        progress=progress,
    )


def pas(
    family: Pretrained | Gated,
    task: Task,
    within: Within,
    *,
    priced: Sequence[CodeCost] = (),
    rate: float | None = None,
    pressure: float = 10.0,
    distil: float = 0.0,
    settings: Settings = SETTINGS,
    seed: int = 0,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> Pruned:
    """Pruning as search: a binary gate a unit, learned with the weights on the same batches.

    Gates do not look at magnitudes: they begin open and close where the loss resists least to
    `pressure` (cost / target - 1)^2, whose target narrows to the limit while the pressure grows fivefold,
    and may open again. `rate`: how far gates move in a step at
    first, on average; by default such that one could go from open to closed four times. Source: Li et al., Pruning-as-Search: Efficient Neural Architecture Search via Channel
    Pruning and Structural Reparameterization, IJCAI 2022. Errors: as of `dsa`.
    """
    gated = _gated(family)
    budget = budgeted(gated, within, priced)
    steps = settings.epochs * steps_of(task, settings.batch)
    if rate is None:
        rate = min(_FASTEST, _TRAVEL / steps)
    whole = budget.costs(np.ones(len(budget.names)))
    costs = [
        Narrowing(one, cost, coefficient=linear(pressure, _HARDER * pressure))
        for one, cost in zip(budget.capped, whole, strict=True)
    ]
    return prune(
        gated,
        task,
        budget,
        BinaryUnits(),
        rule=Descent(rate, joint=True),
        terms=[*costs, *_taught(gated, distil)],
        settings=settings,
        seed=seed,
        checkpoint=checkpoint,
        progress=progress,
    )


def bip(
    family: Pretrained | Gated | nn.Module,
    task: Task,
    within: Within | float,
    *,
    priced: Sequence[CodeCost] = (),
    rate: float = 0.05,
    curvature: float = 1.0,
    layers: Sequence[str] | None = None,
    settings: Settings = SETTINGS,
    seed: int = 0,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> Pruned:
    """Bi-level pruning: the best units that fit, by scores that know how weights answer to masks.

    The limits are kept in every step. Given a plain model and a number, single weights are masked
    and that share of them is kept (in `layers`, all by default); `network()` then holds zeros.
    Source: Zhang et al., Advancing Model Pruning via Bi-level Optimization, NeurIPS 2022.
    Errors: as of `dsa`.
    """
    if isinstance(family, nn.Module) and not isinstance(family, Gated):
        assert isinstance(within, float)
        gated = weight_gates(family, layers)
        budget = sparse_budget(gated, within)
        gates = TopUnits(budget, curvature, even=False)
    else:
        assert not isinstance(within, float)
        gated = _gated(family)
        budget = budgeted(gated, within, priced)
        gates = TopUnits(budget, curvature, every=4)
    return prune(
        gated,
        task,
        budget,
        gates,
        rule=Descent(rate),
        settings=settings,
        seed=seed,
        checkpoint=checkpoint,
        progress=progress,
    )


def _gated(family: Pretrained | Gated) -> Gated:
    return family if isinstance(family, Gated) else unit_gates(family)


def _taught(gated: Gated, share: float) -> list[Term]:
    return [Original(copy.deepcopy(gated.model), share)] if share else []
