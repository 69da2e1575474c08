"""What gates may spend: costs of shares of units, the nearest shares within limits, and candidates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from espalier.errors import BudgetError
from espalier.solvers.relax.expected import Expected
from espalier.space import Candidate

Shares = NDArray[np.float64]
_HALVINGS, _TURNS = 26, 3


def hat(kept: Tensor, counts: Sequence[int]) -> Tensor:
    """Weights `(options,)` of options that keep `counts` units, whose mean count is `kept`.

    Only the two options beside it have any, so a cost that is linear between options is exact. Beyond
    the ends the weights stay at the end and the gradient goes on.
    """
    if len(counts) == 1:
        return kept.new_ones(1)
    grid = torch.as_tensor(counts, dtype=kept.dtype, device=kept.device)
    low = int((grid[1:-1] <= kept.detach()).sum())
    right = (kept - grid[low]) / (grid[low + 1] - grid[low])
    right = right + (right.detach().clamp(0, 1) - right.detach())
    out = kept.new_zeros(len(counts)).index_put((torch.tensor(low),), 1 - right)
    return out.index_put((torch.tensor(low + 1),), right)


@dataclass(frozen=True)
class Capped:
    """A cost that adds up over pieces, and the most it may be."""

    name: str
    cost: Expected
    most: float


class Budget:
    """Limits on the costs of a gated model, as a function of the share of units that each gate keeps.

    `shares` are arrays in the order of `names`. Between options costs are interpolated: multiply-
    accumulates and parameters are exact so, latencies as exact as their table.
    Errors: `BudgetError` where the smallest model is over a limit, with what it costs.
    """

    def __init__(self, gated: Any, capped: Sequence[Capped]) -> None:
        self.names: tuple[str, ...] = tuple(gated.mixable)
        self.counts: dict[str, tuple[int, ...]] = {n: gated.counts[n] for n in self.names}
        self.space, self.capped = gated.space, tuple(capped)
        self.least = np.array([self.counts[n][0] / self.counts[n][-1] for n in self.names])
        self._tables = [_Table(one.cost, self.names, self.space) for one in capped]
        for one, found in zip(self.capped, self.costs(self.least), strict=True):
            if found > one.most * (1 + 1e-9):
                raise BudgetError(
                    f"{one.name} can't be at most {one.most:g} by these gates: the smallest model has "
                    f"{found:g}; raise the limit or lower the least width"
                )

    def costs(self, shares: Shares) -> list[float]:
        """Each cost at these shares."""
        return [table(self._hats(shares)) for table in self._tables]

    def over(self, shares: Shares) -> float:
        """By how much the worst limit is broken, as a share of it; below 0 where all are kept."""
        pairs = zip(self.costs(shares), self.capped, strict=True)
        return max((found / one.most - 1 for found, one in pairs), default=-1.0)

    def project(self, shares: Shares, exact: bool = False) -> Shares:
        """The nearest shares (Euclid's distance) within the limits; with `exact`, at the tightest one.

        Costs are monotone in shares, so a step along the gradient of the worst limit is bisected.
        """
        point = np.clip(shares, self.least, 1.0)
        if not self.capped or (not exact and self.over(point) <= 0):
            return point
        start = point
        for _ in range(_TURNS):
            point = self._along(start, point, self._tightest(point))
        for _ in range(len(self.capped)):  # what another limit still asks for
            if self.over(point) > 1e-9:
                point = self._along(point, point, self._tightest(point))
        return point

    def _tightest(self, shares: Shares) -> int:
        costs = self.costs(shares)
        return int(np.argmax([c / one.most for c, one in zip(costs, self.capped, strict=True)]))

    def _along(self, start: Shares, at: Shares, limit: int) -> Shares:
        """From `start` along a cost's gradient at a point, down or up, to where its limit is just kept."""
        slope = self._slope(at, limit)

        def broken(step: float) -> bool:
            cost = self._tables[limit](self._hats(self._at(start, slope, step)))
            return cost > self.capped[limit].most

        down = broken(0.0)
        near, far = 0.0, 1.0 if down else -1.0
        while broken(far) == down:
            near, far = far, 2 * far
            if abs(far) > 1e9:
                return self.least.copy() if down else self._at(start, slope, near)
        low, high = (near, far) if down else (far, near)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if broken(middle) else (low, middle)
        return self._at(start, slope, high)

    def _at(self, start: Shares, slope: Shares, step: float) -> Shares:
        return np.clip(start - step * slope, self.least, 1.0)

    def _slope(self, shares: Shares, limit: int) -> Shares:
        """The gradient of a limit's cost, of length 1."""
        given = torch.tensor(shares, requires_grad=True)
        total = self.capped[limit].cost(self.probabilities(given))
        (found,) = torch.autograd.grad(total, given)
        out: Shares = found.numpy()
        return out / max(float(np.linalg.norm(out)), 1e-12)

    def probabilities(self, shares: Tensor) -> dict[str, Tensor]:
        """Shares as the weights of options that a cost reads; decisions without gates are whole."""
        out = {}
        for name, share in zip(self.names, shares, strict=True):
            out[name] = hat(share * self.counts[name][-1], self.counts[name])
        for decision in self.space.decisions:
            if decision.name not in out and decision.count:
                out[decision.name] = shares.new_zeros(decision.count)
                out[decision.name][-1] = 1.0
        return out

    def _hats(self, shares: Shares) -> dict[str, Shares]:
        out = {}
        for name, share in zip(self.names, shares.tolist(), strict=True):
            grid = np.asarray(self.counts[name], dtype=float)
            at = min(max(share * grid[-1], grid[0]), grid[-1])
            low = min(int(np.searchsorted(grid, at, "right")) - 1, max(len(grid) - 2, 0))
            weights = np.zeros(len(grid))
            right = 0.0 if len(grid) == 1 else (at - grid[low]) / (grid[low + 1] - grid[low])
            weights[low] = 1 - right
            if right:
                weights[low + 1] = right
            out[name] = weights
        return out

    def settle(self, shares: Shares) -> Candidate:
        """The candidate nearest to shares that keeps every limit and leaves least of them unused.

        Shares are brought to the tightest limit and rounded down; then the option that lags most
        behind is raised, as long as one fits.
        """
        wanted = self.project(shares, exact=bool(self.capped))
        grids = [np.asarray(self.counts[n], dtype=float) / self.counts[n][-1] for n in self.names]
        codes = [max(int((g <= w + 1e-9).sum()) - 1, 0) for g, w in zip(grids, wanted, strict=True)]
        while True:
            now = np.array([g[c] for g, c in zip(grids, codes, strict=True)])
            for place in np.argsort(now - wanted, kind="stable"):
                if codes[place] + 1 == len(grids[place]):
                    continue
                raised = now.copy()
                raised[place] = grids[place][codes[place] + 1]
                if self.over(raised) <= 1e-9:
                    codes[place] += 1
                    break
            else:
                break
        row = self.space.corner(last=True)
        for name, code in zip(self.names, codes, strict=True):
            row[0, self.space.names.index(name)] = code
        found: Candidate = self.space.decode(self.space.canonical(row))[0]
        return found


class _Table:
    """An expected cost in numpy, for the many evaluations of a bisection."""

    def __init__(self, cost: Expected, names: Sequence[str], space: Any) -> None:
        self._constant = float(cost.constant)
        self._tables: list[tuple[tuple[str, ...], Shares]] = []
        for owners, table in cost.tables.items():
            values = table.numpy().astype(float)
            for axis in reversed(range(len(owners))):
                if owners[axis] not in names:  # nothing gates it: the original
                    values = np.take(values, -1, axis=axis)
            self._tables.append((tuple(o for o in owners if o in names), values))

    def __call__(self, hats: Mapping[str, Shares]) -> float:
        total = self._constant
        for owners, values in self._tables:
            found = values
            for name in reversed(owners):
                found = found @ hats[name]
            total += float(found)
        return total
