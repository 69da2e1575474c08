"""Narrower layers of models that do not fit in memory: units and heads go, what stays takes over."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from espalier.compress.language.anatomy import Experts, Layer, anatomy
from espalier.compress.language.layer_by_layer.layerwise import Inputs, Visit
from espalier.compress.language.repair.compensating import DAMP, Moments
from espalier.compress.language.shape.surgery import channels, keep_heads, keep_units
from espalier.compress.language.weights.places import collected, places
from espalier.errors import EspalierError

MULTIPLE = 8  # widths that are left are multiples of this, where there are so many
# up to so many units they go one after the other, each time the one that is missed least; up to WIDE
# by what each alone would be missed; above by what they give, which needs no inverse matrix
FEW, WIDE = 512, 4096


def narrowed(units: float = 1.0, groups: float = 1.0) -> Visit:
    """What `Layerwise.run` visits layers with, to leave a share of each feed-forward's units and of
    each attention's groups of heads: of the same number in every layer of a size.

    Those go whose loss is least when the others make up for it, and the map behind them is fitted
    anew by least squares on what stands before the layer (see `compensating`). The attention is
    narrowed first, and the feed-forward sees what it then gives. Memory beside the layer: some
    square matrices of the widest map, float64 (`room` of `Layerwise.run`: see `narrow_room`).

    Errors: `EspalierError` for a share that is not above 0 and up to 1.
    """
    for name, share in (("units", units), ("groups", groups)):
        if not 0 < share <= 1:
            raise EspalierError(f"a share of {name} is above 0 and up to 1, got {share}")

    def visit(number: int, layer: nn.Module, inputs: Inputs) -> None:
        model: Any = inputs.model
        now = anatomy(model).layers[0]
        if now.attention is not None and (few := least(now.attention.groups, groups, 1)):
            Narrowing(inputs, layer, "attention").cut(model, few)
        if now.feed is not None and (few := least(now.feed.width, units)):
            Narrowing(inputs, layer, "feed").cut(model, few)

    return visit


@dataclass
class Harms:
    """Reads what options of each layer harm: a visit of `Layerwise.run` that changes nothing.

    The harm of an option is the error of the layer's output, squared, relative to the output
    squared, all else left as it is. `blocks`: layer -> its harm when left out; `units`, `groups`:
    (layer, share that stays) -> harm, after what stays took over.
    """

    unit_shares: Sequence[float] = ()
    group_shares: Sequence[float] = ()
    blocks: dict[int, float] = field(default_factory=dict)
    units: dict[tuple[int, float], float] = field(default_factory=dict)
    groups: dict[tuple[int, float], float] = field(default_factory=dict)

    @torch.no_grad()
    def __call__(self, number: int, layer: nn.Module, inputs: Inputs) -> None:
        outputs = zip(inputs, inputs.through(layer), strict=True)
        self.blocks[number] = _relative((before, after) for before, after in outputs)
        now = anatomy(inputs.model).layers[0]
        parts = (
            ("attention", self.group_shares, self.groups, 1),
            ("feed", self.unit_shares, self.units, MULTIPLE),
        )
        for part, shares, found, multiple in parts:
            if getattr(now, part) is None or not shares:
                continue
            narrowing = Narrowing(inputs, layer, part)
            for share in shares:
                few = least(narrowing.count, share, multiple)
                found[number, share] = self._harm(narrowing, inputs, layer, few) if few else 0.0

    def to_json(self) -> list[Any]:
        """What was read so far."""
        parts: list[Any] = [list(found.items()) for found in (self.units, self.groups)]
        return [list(self.blocks.items()), *parts]

    def take(self, data: list[Any]) -> None:
        """Puts what `to_json` told in place."""
        blocks, *parts = data
        self.blocks = {int(layer): harm for layer, harm in blocks}
        self.units, self.groups = (
            {(int(layer), share): harm for (layer, share), harm in part} for part in parts
        )

    def _harm(self, narrowing: Narrowing, inputs: Inputs, layer: nn.Module, few: int) -> float:
        twin = copy.deepcopy(inputs.model)
        narrowing.cut(twin, few)
        narrow = twin.get_submodule(anatomy(twin).layers[0].path)
        return _relative(zip(inputs.through(narrow), inputs.through(layer), strict=True))


class Narrowing:
    """What is known of one layer's attention or feed-forward: which groups of heads or units go
    first, and how the others take over. `count`: how many there are."""

    def __init__(self, inputs: Inputs, layer: nn.Module, part: str) -> None:
        model: Any = inputs.model
        now = anatomy(model).layers[0]
        owner: Any = getattr(now, part)
        self._mixed, self._heads = isinstance(owner, Experts), part == "attention"
        self._each = owner.heads // owner.groups * owner.head if self._heads else 1
        self.count: int = owner.groups if self._heads else owner.width
        end = "experts" if self._mixed else "out" if self._heads else "down"
        place = places(anatomy(model))[f"{now.path}.{end}"]
        found = collected(model, [place], partial(_pass, inputs, layer))[place.name]
        grams = found["down_proj" if self._mixed else ""]
        self._moments = [Moments(gram) for gram in (grams if self._mixed else grams[None])]
        pairs = zip(self._moments, self._ends(model), strict=True)
        self._order = [_order(moments, end, self._each) for moments, end in pairs]

    @torch.no_grad()
    def cut(self, model: Any, few: int) -> None:
        """Leave `few` in the first layer of a model: the one that was looked at, or a copy."""
        kept = [order[-few:].sort().values for order in self._order]
        for moments, end, own in zip(self._moments, self._ends(model), kept, strict=True):
            moments.take_over(end, None, channels(own, self._each))
        if self._heads:
            keep_heads(model, 0, kept[0])
        else:
            keep_units(model, 0, torch.stack(kept) if self._mixed else kept[0])

    def _ends(self, model: Any) -> list[Tensor]:
        """The matrices (out, in) behind what goes."""
        now = anatomy(model).layers[0]
        if isinstance(now.feed, Experts) and not self._heads:
            return list(model.get_submodule(f"{now.feed.path}.experts").down_proj)
        owner: Any = now.attention if self._heads else now.feed
        return [(owner.out if self._heads else owner.down).read(model)]


def narrow_room(layer: Layer) -> int:
    """Bytes that narrowing a layer takes: four matrices of its widest inner map, in float64."""
    attention, feed = layer.attention, layer.feed
    wide = attention.heads * attention.head if attention else 0
    count = feed.count if isinstance(feed, Experts) else 1
    return 8 * max(4 * wide**2, (count + 3) * (feed.width if feed else 0) ** 2)


def least(count: int, share: float, multiple: int = MULTIPLE) -> int:
    """How many of `count` are left; 0 where all stay."""
    step = multiple if count >= 2 * multiple else 1
    left = min(count, max(step, -(-round(count * share) // step) * step))
    return 0 if left == count else left


def _order(moments: Moments, weight: Tensor, each: int) -> Tensor:
    """Groups of columns in the order they go."""
    if each > 1 or weight.shape[1] <= FEW:
        return moments.order(weight, each)
    gram, size = moments.gram, weight.double().square().sum(0)
    missed = size * gram.diagonal()
    if weight.shape[1] <= WIDE:
        damp = DAMP * gram.diagonal().mean().clamp_min(1e-12)
        inverse = torch.linalg.inv(gram + damp * torch.eye(len(gram), dtype=gram.dtype))
        missed = size / inverse.diagonal()
    return missed.argsort(stable=True)


def _pass(inputs: Inputs, layer: nn.Module) -> None:
    for _ in inputs.through(layer):
        pass


def _relative(pairs: Any) -> float:
    """Squared difference of what is to what should be, relative to that; over all chunks."""
    wrong = size = 0.0
    for found, wanted in pairs:
        wrong += float((found.double() - wanted.double()).square().sum())
        size += float(wanted.double().square().sum())
    return wrong / max(size, 1e-30)
