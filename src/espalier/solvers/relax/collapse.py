"""Which options of a decision have no weights: where differentiable search goes to die."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from espalier.nets.elastic.containers import OneOf
from espalier.space import Option

# where the supernet's modules don't tell: the names that these operators have in cells
_NAMES = ("none", "zero", "skip", "skip_connect", "identity", "avg_pool_3x3", "max_pool_3x3")


def without_weights(supernet: Any, names: Sequence[str]) -> dict[str, frozenset[int]]:
    """For each decision between operators, the indices of the options that hold no parameters.

    Decisions all of whose options hold some, or none do, are left out: nothing can collapse there.
    """
    found: dict[str, frozenset[int]] = {}
    for module in supernet.modules():
        if isinstance(module, OneOf) and module.decision.name in names:
            empty = [
                int(module.decision.code(option))
                for child, when in module.branches()
                for option in when[module.decision.name]
                if next(child.parameters(), None) is None
            ]
            found[module.decision.name] = frozenset(empty)
    for name in names:
        if name not in found:
            options: Sequence[Option] = supernet.space[name].options
            found[name] = frozenset(i for i, o in enumerate(options) if o in _NAMES)
    return {n: kept for n, kept in found.items() if 0 < len(kept) < supernet.space[n].count}


def parameterless(empty: Mapping[str, frozenset[int]], probabilities: Mapping[str, Tensor]) -> int:
    """How many decisions between operators are likeliest to take one without parameters."""
    return sum(int(probabilities[name].argmax()) in kept for name, kept in empty.items())
