"""Counts of a family with very many widths: priced at three of each, and exact in between.

Parameters and multiply-accumulates of a layer are polynomials in the widths of its groups, of degree two
at the most (a group may be input and output of one layer). So three widths a decision tell them all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from espalier.costs import Counts
from espalier.solvers.allocate import Factor, totals
from espalier.solvers.allocate.pricing import cost_factors
from espalier.space import Space, ordinal

_NODES = 3
_TRIED = 6  # random candidates that the polynomials are checked on
POLYNOMIAL = ("macs", "params", "bytes")


def count_factors(family: Any, metric: str) -> list[Factor]:
    """A count of a family as factors, exact; by all combinations where it is no polynomial."""
    space: Space = family.space
    if metric not in POLYNOMIAL or max(d.count for d in space.decisions) <= 2 * _NODES:
        return cost_factors(family, metric, Counts)
    coarse = _Coarse(family)
    found = [
        Factor(f.decisions, _refined(f.values, [coarse.blend[n] for n in f.decisions]), name=f.name)
        for f in cost_factors(coarse, metric, Counts(coarse))
    ]
    rows = space.sample(_TRIED, np.random.default_rng(0))
    wanted = Counts(family).estimate(space.decode(rows))[metric]
    if np.allclose(totals(space, found, rows), wanted, rtol=1e-9):
        return found
    return cost_factors(family, metric, Counts)


class _Coarse:
    """A family with three options of each width; its networks and units are the family's own."""

    def __init__(self, family: Any) -> None:
        self._family = family
        self.blend: dict[str, NDArray[np.float64]] = {}
        decisions = []
        for decision in family.space.decisions:
            options = decision.options
            if decision.count > _NODES and all(isinstance(o, int) for o in options):
                nodes = sorted({0, decision.count // 2, decision.count - 1})
                self.blend[decision.name] = _lagrange(options, [options[i] for i in nodes])
                own = ordinal(decision.name, *(options[i] for i in nodes), when=decision.when)
                decisions.append(own)
            else:
                self.blend[decision.name] = np.eye(decision.count)
                decisions.append(decision)
        self.space = Space(decisions)

    def build(self, candidate: Mapping[str, Any]) -> nn.Module:
        network: nn.Module = self._family.build(dict(candidate))
        return network

    def example(self, batch: int = 1) -> Tensor:
        x: Tensor = self._family.example(batch)
        return x

    def units(self) -> Any:
        return self._family.units()

    def unit(self, name: str, candidate: Mapping[str, Any]) -> Any:
        return self._family.unit(name, candidate)


def _lagrange(at: Sequence[Any], nodes: Sequence[Any]) -> NDArray[np.float64]:
    """`(at, nodes)`: what each node's value weighs at each place."""
    x, n = np.asarray(at, dtype=float), np.asarray(nodes, dtype=float)
    out = np.ones((len(x), len(n)))
    for j in range(len(n)):
        for k in range(len(n)):
            if k != j:
                out[:, j] *= (x - n[k]) / (n[j] - n[k])
    return out


def _refined(
    values: NDArray[np.float64], blends: Sequence[NDArray[np.float64]]
) -> NDArray[np.float64]:
    for axis, blend in enumerate(blends):
        values = np.moveaxis(np.tensordot(blend, values, axes=(1, axis)), 0, axis)
    return values
