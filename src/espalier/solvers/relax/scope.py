"""Which decisions a search relaxes, and what the others hold."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from espalier.errors import SpaceError, unknown
from espalier.space import Candidate, Option, Real


def names_of(supernet: Any, names: Sequence[str] | None) -> tuple[str, ...]:
    """The decisions to relax: `names`, or all that can be mixed but the topology of nodes.

    Errors: `SpaceError` for one that can't be mixed, or where there is none.
    """
    mixable = tuple(supernet.mixable)
    chosen = _without_topology(supernet, mixable) if names is None else tuple(names)
    for name in chosen:
        if name not in mixable:
            raise SpaceError(unknown("decision that can be mixed", name, mixable))
    if not chosen:
        raise SpaceError(
            "there is no decision to relax: give names, or a supernet that can mix some"
        )
    return chosen


def _without_topology(supernet: Any, names: Sequence[str]) -> tuple[str, ...]:
    """The names without the decisions that say which edges meet in a node.

    All edges of a node are mixed, as DARTS does, and `Magnitude` finds the strongest.
    """
    decide = _topology(supernet, supernet.space.names)
    return tuple(name for name in names if name not in decide)


def _topology(supernet: Any, mixed: Collection[str]) -> set[str]:
    """The decisions that say which of some mixed edges meet in a node."""
    space = supernet.space
    edges = {edge for join in supernet.joins.values() for edge in join if edge in mixed}
    return {parent for edge in edges if edge in space for parent in space[edge].when}


def held_of(
    supernet: Any, names: Collection[str], base: Mapping[str, Option], device: torch.device
) -> dict[str, Tensor]:
    """Probabilities `(options,)` of the decisions that are not relaxed, for terms that want them.

    1 at the option of `base`, at the last where it has none. Decisions on which edges meet in a node
    are even, as all its edges run.
    """
    topology, out = _topology(supernet, names), {}
    for decision in supernet.space.decisions:
        if decision.name in names or isinstance(decision, Real):
            continue
        chances = torch.zeros(decision.count, device=device)
        if decision.name in topology:
            chances.fill_(1 / decision.count)
        else:
            held = base.get(decision.name)
            chances[-1 if held is None else int(decision.code(held))] = 1.0
        out[decision.name] = chances
    return out


def base_of(supernet: Any) -> Candidate:
    """The active candidate, or the largest: what decisions hold that are not relaxed."""
    active: Candidate | None = getattr(supernet, "active", None)
    if active is not None:
        return active
    space = supernet.space
    largest = space.corner(last=True)
    if not space.valid(largest).all():
        largest = space.repair(largest, np.random.default_rng(0))
    found: Candidate = space.decode(largest)[0]
    return found
