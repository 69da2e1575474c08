"""Decisions on the shape of a transformer: sub-layers and blocks here; heads, inner units and hidden
channels beside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from espalier.compress.cut import Cut
from espalier.compress.language.anatomy import anatomy
from espalier.compress.language.shape.cut import BoundShape, Choices, chosen_layers, inside
from espalier.compress.language.shape.narrower import Hidden as Hidden
from espalier.compress.language.shape.slices import Heads as Heads
from espalier.compress.language.shape.slices import Units as Units
from espalier.compress.language.shape.surgery import drop, empty_blocks
from espalier.errors import EspalierError, unknown
from espalier.space import Linear, ordinal


@dataclass(frozen=True)
class SubLayers(Cut):
    """Leaves out attentions and feed-forwards, each by itself: "attention:model.layers.3" and
    "feed:model.layers.3" are 1 (kept, the original) or 0 (it adds nothing).

    `parts`: which of the two are decided; `only`: numbers of layers, all by default. One attention
    stays (Zhang, Xu, Song, Wang & Chen, FinerCut, 2024, decides on the same units).
    """

    kind: ClassVar[str] = "sublayer"
    parts: tuple[str, ...] = ("attention", "feed")
    only: Sequence[int] | None = None

    def __post_init__(self) -> None:
        for part in self.parts:
            if part not in ("attention", "feed"):
                raise EspalierError(unknown("part of a layer", part, ("attention", "feed")))

    def bind(self, model: nn.Module, example: Tensor) -> BoundSubLayers:
        """The sub-layers of a model. Errors: `EspalierError` for another architecture."""
        parts = anatomy(model)
        chosen = [layer for _, layer in chosen_layers(parts, self.only)]
        names = [
            f"{part}:{layer.path}"
            for layer in chosen
            for part in self.parts
            if getattr(layer, part) is not None
        ]
        reach: dict[str, tuple[str, ...]] = {}
        for layer in chosen:
            for part in self.parts:
                for path in inside(parts, layer, part):
                    reach[path] = (*reach.get(path, ()), f"{part}:{layer.path}")
        attends = [n for n in names if n.startswith("attention:")]
        others = sum(layer.attention is not None for layer in parts.layers) - len(attends)
        rules = [Linear(dict.fromkeys(attends, 1.0), ">=", 1.0)] if attends and not others else []
        return BoundSubLayers(model, [ordinal(n, 0, 1) for n in names], reach, rules)


class BoundSubLayers(BoundShape):
    """The sub-layers of one model."""

    def apply(self, model: nn.Module, choices: Choices) -> None:
        """Drop what is chosen to go; of a block that is gone nothing is left to drop."""
        for number, _, part, _ in self.places_of(choices):
            drop(model, number, cast(Any, part))


@dataclass(frozen=True)
class Blocks(Cut):
    """Leaves out whole blocks: "block:model.layers.3" is 1 (kept, the original) or 0. One stays.

    `only`: numbers of layers, all by default. `apply` leaves a block that is out in its place, empty,
    so that paths of modules stay true for other cuts; `Language` takes it out at the end.
    """

    kind: ClassVar[str] = "block"
    only: Sequence[int] | None = None

    def bind(self, model: nn.Module, example: Tensor) -> BoundBlocks:
        """The blocks of a model. Errors: `EspalierError` for another architecture."""
        parts = anatomy(model)
        chosen = [layer for _, layer in chosen_layers(parts, self.only)]
        names = [f"block:{layer.path}" for layer in chosen]
        reach = {
            f"{layer.path}.{path}" if path else layer.path: (f"block:{layer.path}",)
            for layer in chosen
            for path, _ in model.get_submodule(layer.path).named_modules()
        }
        full = len(names) == len(parts.layers)
        rules = [Linear(dict.fromkeys(names, 1.0), ">=", 1.0)] if full else []
        return BoundBlocks(model, [ordinal(n, 0, 1) for n in names], reach, rules)


class BoundBlocks(BoundShape):
    """The blocks of one model."""

    def apply(self, model: nn.Module, choices: Choices) -> None:
        """Empty the blocks that are chosen to go."""
        empty_blocks(model, [number for number, *_ in self.places_of(choices)])
