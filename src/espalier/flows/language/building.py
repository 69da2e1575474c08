"""Candidates of a language model in two steps: the shape first, then the numbers in what is left.

Repair stands between them: sparsity and bits are made on the repaired weights.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from espalier.compress.language.anatomy import anatomy
from espalier.compress.language.shape.surgery import drop_blocks, empty

LATE = ("sparsity", "bits")  # decided on the numbers in what is left
CACHED = ("kv", "rank", "span")  # change no weight


def early(family: Any, candidate: Mapping[str, Any]) -> nn.Module:
    """The model with its shape changed and numbers as they were; blocks that go stay, empty."""
    network: nn.Module = copy.deepcopy(family.model)
    _apply(family, network, candidate, False)
    return network.eval()


def late(
    family: Any, network: nn.Module, candidate: Mapping[str, Any], hollow: bool = False
) -> nn.Module:
    """A copy with fewer bits and weights, as decided; without the empty blocks unless `hollow`."""
    twin = copy.deepcopy(network)
    _apply(family, twin, candidate, True)
    return twin.eval() if hollow else dense(twin)


def dense(network: nn.Module) -> nn.Module:
    """The model in place without its empty blocks."""
    gone = empty(network)
    if gone:
        every = len(gone) == len(anatomy(network).layers)
        drop_blocks(network, gone[1:] if every else gone)
    return network.eval()


def reshaped(family: Any, candidate: Mapping[str, Any]) -> bool:
    """Whether anything but numbers and the cache is decided otherwise than in the original."""
    return any(
        candidate.get(d.name, d.options[-1]) != d.options[-1]
        for d in family.space.decisions
        if d.name.partition(":")[0] not in (*LATE, *CACHED)
    )


def _apply(family: Any, network: nn.Module, candidate: Mapping[str, Any], late: bool) -> None:
    for cut in family.cuts:
        own = {d.name: candidate.get(d.name, d.options[-1]) for d in cut.decisions}
        kinds = {name.partition(":")[0] for name in own}
        changed = any(own[d.name] != d.options[-1] for d in cut.decisions)
        if changed and bool(kinds & set(LATE)) == late:
            cut.apply(network, own)
