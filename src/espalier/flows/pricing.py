"""All the costs of a family at once, and what of a budget can be reached at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.costs import CodeCost, Cost
from espalier.errors import BudgetError, unknown
from espalier.problem import Limit, Metric, Metrics, Problem
from espalier.space import Space

Codes = NDArray[Any]


class Pricing:
    """Prices whole arrays of codes with several costs; candidates are decoded only for costs that
    can't read codes, and those are asked once a candidate."""

    def __init__(self, space: Space, costs: Sequence[Cost]) -> None:
        self.space = space
        self.costs = tuple(costs)
        self._known: list[dict[Any, Metrics]] = [{} for _ in self.costs]

    @property
    def metrics(self) -> dict[str, Metric]:
        """Everything that can be limited, by name."""
        return {m.name: m for cost in self.costs for m in cost.metrics}

    def __call__(self, codes: Codes) -> Metrics:
        """The columns of every cost, a row a code row."""
        parts = [self._price(i, codes) for i in range(len(self.costs))]
        out = parts[0]
        for part in parts[1:]:
            out = out | part
        return out

    def _price(self, index: int, codes: Codes) -> Metrics:
        cost = self.costs[index]
        if isinstance(cost, CodeCost):
            return cost.estimate_codes(codes)
        known = self._known[index]
        candidates = self.space.decode(codes)
        new = list(dict.fromkeys(c for c in candidates if c not in known))
        for candidate in new:
            known[candidate] = cost.estimate([candidate])
        return Metrics.concat([known[c] for c in candidates])


def check_names(
    limits: Sequence[Limit], costs: Mapping[str, Metric], quality: Sequence[Metric]
) -> None:
    """Refuses limits on what no cost gives, naming the nearest that one does."""
    for limit in limits:
        if limit.metric in {m.name for m in quality}:
            raise BudgetError(
                f"{limit.metric!r} is what the search makes best, not a cost: limits are on costs, "
                f"like {', '.join(sorted(costs))}"
            )
        if limit.metric not in costs:
            raise BudgetError(unknown("cost in the limits", limit.metric, costs))


def resolve(limits: Sequence[Limit], pricing: Pricing) -> tuple[Limit, ...]:
    """Turns "60%" into a number: a share of what the largest candidate costs."""
    if not any(limit.relative for limit in limits):
        return tuple(limits)
    largest = pricing(pricing.space.corner(last=True))
    return tuple(limit.resolve(float(largest[limit.metric][0])) for limit in limits)


def _descend(pricing: Pricing, score: Any, rng: np.random.Generator, rounds: int = 12) -> Codes:
    """The code rows with the lowest score that a short evolution on prices finds, best first."""
    space = pricing.space
    codes = np.concatenate(
        [space.corner(last=False), space.corner(last=True), space.sample(1000, rng)]
    )
    codes = codes[space.valid(codes)]
    for _ in range(rounds):
        best = codes[np.argsort(score(pricing(codes)), kind="stable")[:60]]
        children = space.mutate(np.repeat(best, 5, axis=0), rng)
        codes = np.concatenate([best, children[space.valid(children)]])
        codes = codes[space.unique(codes)]
    return codes[np.argsort(score(pricing(codes)), kind="stable")]


def _best_bound(pricing: Pricing, limit: Limit, rng: np.random.Generator) -> float:
    sign = 1.0 if limit.op == "<=" else -1.0
    codes = _descend(pricing, lambda m: sign * m[limit.metric], rng)
    return float(pricing(codes[:1])[limit.metric][0])


def check_reach(limits: Sequence[Limit], pricing: Pricing, name: str, seed: int) -> None:
    """Refuses a budget that no candidate can keep: says which limit binds and what is reachable.

    Prices are searched, not enumerated, so the smallest reachable value is the smallest found.
    """
    if not limits:
        return
    rng = np.random.default_rng([seed, 0x5EED])
    problem = Problem((), tuple(limits))
    closest = _descend(pricing, problem.violations, rng)[:1]
    if float(problem.violations(pricing(closest))[0]) <= 0:
        return
    binding = []
    for limit in limits:
        bound = _best_bound(pricing, limit, rng)
        if limit.violation([bound])[0] > 0:
            metric = pricing.metrics[limit.metric]
            word = "smallest" if limit.op == "<=" else "largest"
            binding.append(
                f"{limit} can't be kept: the {word} reachable is {bound:.4g} {metric.unit}".rstrip()
                + f" ({metric.how})"
            )
    if binding:
        raise BudgetError(
            f"no network of {name} fits: {'; '.join(binding)}. Raise the limit or use a smaller family"
        )
    price = pricing(closest)
    had = ", ".join(
        f"{x.metric} {float(price[x.metric][0]):.4g} (limit {x.bound:.4g})" for x in limits
    )
    raise BudgetError(
        f"no network of {name} fits: each limit can be kept alone, but not all together; "
        f"the closest candidate has {had}"
    )


def hand_scaled(space: Space, steps: int = 201) -> Codes:
    """The family scaled by hand, small to large: all decisions grow together, as evenly as whole
    options allow (each a little after the one before, so that there are many sizes, not three)."""
    low = space.corner(last=False)[0].astype(float)
    high = space.corner(last=True)[0].astype(float)
    late = (np.arange(len(space)) + 0.5) / max(len(space), 1)
    grid = low + np.linspace(0, 1, steps)[:, None] * (high - low)
    whole = np.array([getattr(d, "count", 0) > 0 for d in space.decisions])
    grid[:, whole] = np.floor(grid[:, whole] + late[whole])
    grid = np.clip(grid, low, high)
    codes = space.canonical(grid.astype(space.dtype))
    codes = codes[space.valid(codes)]
    return codes[space.unique(codes)]
