"""Which blocks, widths and heads a model keeps under a limit of bytes, all layers of one shape."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from espalier.compress.language.anatomy import Experts, Layer, anatomy
from espalier.compress.language.files.configuration import expressible
from espalier.compress.language.layer_by_layer.narrow import Harms, least
from espalier.compress.language.layer_by_layer.pieces import Pieces
from espalier.compress.language.shape.surgery import keep_heads
from espalier.errors import BudgetError

STEPS = 32  # shares of units are whole parts of this


@dataclass(frozen=True)
class Fit:
    """A smaller model of layers of one shape: layers left out, shares of units and groups of heads
    that stay, bytes of its weights as stored, and its harm, added up from layers."""

    gone: tuple[int, ...]
    units: float
    groups: float
    bytes: int
    harm: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**vars(self), "gone": list(self.gone)}


def fits(pieces: Pieces, harms: Harms, limit: float) -> list[Fit]:
    """For each pair of shares, the blocks to leave out so that bytes keep the limit: those whose
    leaving adds least harm for the bytes it saves. Of as many blocks and heads the share of units
    with least harm; least harm first.

    Errors: `BudgetError` where even the smallest model is above the limit.
    """
    best: dict[tuple[int, float], Fit] = {}
    smallest = 0
    steps = round(min((1.0, *harms.unit_shares)) * STEPS)
    for step in range(steps, STEPS + 1):
        for groups in (1.0, *harms.group_shares):
            fit = _fit(pieces, harms, limit, step / STEPS, groups)
            smallest = min(fit.bytes, smallest or fit.bytes)
            key = (len(fit.gone), groups)
            if fit.bytes <= limit and (key not in best or fit.harm < best[key].harm):
                best[key] = fit
    if not best:
        raise _unreachable(pieces, limit, smallest)
    return sorted(best.values(), key=lambda fit: fit.harm)


def check_reach(pieces: Pieces, units: float, groups: float, limit: float) -> None:
    """Refuses a limit that one layer with these shares, the least that may stay, is above: before
    anything is read. Errors: `BudgetError`."""
    layers = range(len(pieces.own.layers))
    smallest = outside(pieces) + min(layer_bytes(pieces, i, units, groups) for i in layers)
    if smallest > limit:
        raise _unreachable(pieces, limit, smallest)


def _unreachable(pieces: Pieces, limit: float, smallest: int) -> BudgetError:
    return BudgetError(
        f"bytes <= {limit:.0f} can't be kept: {outside(pieces)} lie outside of layers, with the "
        f"smallest layer it is {smallest}: ask for {smallest} or more"
    )


def outside(pieces: Pieces) -> int:
    """Bytes of embedding, head and last norm, as stored."""
    return pieces.bytes((*pieces.entry, *pieces.head), pieces.folder.stored)


def group_shares(pieces: Pieces, shares: Sequence[float]) -> tuple[float, ...]:
    """Those shares of groups of heads that a configuration of this architecture can say."""
    found = []
    kept = [layer.attention.groups for layer in pieces.own.layers if layer.attention]
    for share in shares:
        if not any(least(count, share, 1) for count in kept):
            continue
        twin: Any = copy.deepcopy(pieces.skeleton)
        for i, layer in enumerate(anatomy(twin).layers):
            count = layer.attention.groups if layer.attention else 0
            if few := least(count, share, 1) if count else 0:
                keep_heads(twin, i, range(few))
        if expressible(twin) is None:
            found.append(share)
    return tuple(found)


def layer_bytes(pieces: Pieces, index: int, units: float, groups: float) -> int:
    """Bytes of a layer, as stored, with these shares of its units and groups of heads."""
    layer = pieces.own.layers[index]
    whole: Any = pieces.skeleton.get_submodule(layer.path)
    numbers: int = sum(p.numel() for p in whole.parameters())
    numbers -= _of_heads(pieces, layer, groups) + _of_units(pieces, layer, units)
    return numbers * pieces.folder.stored.itemsize


def _fit(pieces: Pieces, harms: Harms, limit: float, units: float, groups: float) -> Fit:
    count = len(pieces.own.layers)
    sizes = [layer_bytes(pieces, i, units, groups) for i in range(count)]
    own = [_between(harms, i, units) + harms.groups.get((i, groups), 0.0) for i in range(count)]
    size, harm = outside(pieces) + sum(sizes), sum(own)
    gone: list[int] = []
    order = sorted(range(count), key=lambda i: (harms.blocks[i] - own[i]) / sizes[i])
    for i in order[:-1]:
        if size <= limit:
            break
        gone.append(i)
        size, harm = size - sizes[i], harm + harms.blocks[i] - own[i]
    return Fit(tuple(sorted(gone)), units, groups, size, harm)


def _between(harms: Harms, layer: int, share: float) -> float:
    """The harm of a share of units, on the line between those that were read."""
    shares = [s for s in sorted(harms.unit_shares) if (layer, s) in harms.units]
    read = [harms.units[layer, s] for s in shares]
    return float(np.interp(share, [*shares, 1.0], [*read, 0.0]))


def _of_heads(pieces: Pieces, layer: Layer, share: float) -> int:
    """Numbers that go with groups of heads."""
    attention, net = layer.attention, pieces.skeleton
    if attention is None or not (few := least(attention.groups, share, 1)):
        return 0
    gone, total = attention.groups - few, 0
    each = attention.heads // attention.groups * attention.head
    for weights, rows in ((attention.query, each), (attention.key, attention.head)):
        twice = 2 if weights is attention.key else 1  # values have the shape of keys
        per_row = weights.read(net).shape[1] + (weights.bias(net) is not None)
        total += twice * gone * rows * per_row
    return total + gone * each * int(attention.out.read(net).shape[0])


def _of_units(pieces: Pieces, layer: Layer, share: float) -> int:
    """Numbers that go with inner units."""
    feed, net, width = layer.feed, pieces.skeleton, pieces.own.width
    if feed is None or not (few := least(feed.width, share)):
        return 0
    gone = feed.width - few
    if isinstance(feed, Experts):
        return gone * feed.count * 3 * width
    made = [w for w in (feed.up, feed.gate) if w is not None]
    return gone * sum(width + (w.bias(net) is not None) for w in made) + gone * width
