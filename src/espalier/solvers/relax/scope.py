"""Which decisions a search relaxes, and what the others hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from espalier.errors import SpaceError, unknown
from espalier.space import Candidate


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
    space = supernet.space
    edges = {edge for join in supernet.joins.values() for edge in join}
    decide = {parent for edge in edges if edge in space for parent in space[edge].when}
    return tuple(name for name in names if name not in decide)


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
