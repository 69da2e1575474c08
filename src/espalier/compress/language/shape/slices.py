"""How many heads and inner units each layer of a transformer keeps, and which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from espalier.compress.cut import Cut, Ignored
from espalier.compress.language.anatomy import Experts, Layer, anatomy
from espalier.compress.language.importance import IMPORTANCES, head_scores, unit_scores
from espalier.compress.language.repair.compensating import Compensation, fits
from espalier.compress.language.shape.cut import (
    BoundShape,
    Choices,
    chosen_layers,
    inside,
    stepped,
)
from espalier.compress.language.shape.surgery import keep_heads, keep_units
from espalier.errors import EspalierError, unknown
from espalier.space import Decision, ordinal

Scores = Mapping[str, Tensor]
Order = Literal["compensated", "activation", "fluctuation", "norm", "taylor"]
ORDERS = ("compensated", *IMPORTANCES)


@dataclass(frozen=True)
class Heads(Cut):
    """How many groups of heads each attention keeps: "heads:model.layers.3", 1 to all of them. A group
    is one key and value head with all its query heads.

    - `importance`: what orders groups: one of `importance.scores`, or "compensated" (the loss that
      is left when all others have made up for it, one after the other). `calibration`: inputs for
      it, by default the example it is bound with; `scores`: layer's path -> (groups,) in its place.
    - `compensate`: the map behind takes over what went, see `compensating`.
    - `windows`: above 1, "window:model.layers.3.heads" decides where in the order the kept slice
      begins: a share, 1 (the original) for the most important ones, 0 for the least.
    """

    kind: ClassVar[str] = "heads"
    importance: Order = "activation"
    compensate: bool = True
    windows: int = 1
    only: Sequence[int] | None = None
    calibration: Tensor | None = field(default=None, compare=False, repr=False)
    scores: Scores | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        _check(self.importance, self.windows)

    def bind(self, model: nn.Module, example: Tensor) -> BoundSlices:
        """The attentions of a model. Errors: `EspalierError` for another architecture."""
        parts = anatomy(model)
        options: dict[str, tuple[int, ...]] = {}
        ignored = []
        for _, layer in chosen_layers(parts, self.only):
            if layer.attention is None:
                continue
            if layer.attention.groups > 1:
                options[layer.path] = tuple(range(1, layer.attention.groups + 1))
            else:
                ignored.append(Ignored(layer.path, self.kind, "its heads are one group"))
        return BoundSlices(self, model, options, example, ignored)


@dataclass(frozen=True)
class Units(Cut):
    """How many inner units each feed-forward keeps: "units:model.layers.3"; in a mixture, each of
    its experts (a shared expert stays whole).

    - `steps`: how many widths there are to choose from, equal shares of the original's, rounded up
      to multiples of `multiple`; `widths` gives them by hand.
    - `importance`, `compensate`, `calibration`, `windows`, `scores` (layer's path -> (units,), of a
      mixture (experts, units)): as in `Heads`; the window's name ends in ".units".
    """

    kind: ClassVar[str] = "units"
    steps: int = 8
    multiple: int = 8
    widths: Sequence[int] | None = None
    importance: Order = "compensated"
    compensate: bool = True
    windows: int = 1
    only: Sequence[int] | None = None
    calibration: Tensor | None = field(default=None, compare=False, repr=False)
    scores: Scores | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        _check(self.importance, self.windows)
        if self.steps < 2 or self.multiple < 1:
            rule = "steps are 2 widths or more, in multiples of 1 or more"
            raise EspalierError(f"{rule}; got {self.steps} and {self.multiple}")

    def bind(self, model: nn.Module, example: Tensor) -> BoundSlices:
        """The feed-forwards of a model. Errors: `EspalierError`."""
        parts = anatomy(model)
        options: dict[str, tuple[int, ...]] = {}
        ignored = []
        for _, layer in chosen_layers(parts, self.only):
            if layer.feed is None:
                continue
            multiple = 8 * -(-self.multiple // 8) if _mixed(layer) else self.multiple
            widths = stepped(layer.feed.width, self.steps, multiple, self.widths)
            if len(widths) > 1:
                options[layer.path] = widths
            else:
                why = f"{layer.feed.width} units leave no smaller multiple of {multiple}"
                ignored.append(Ignored(layer.path, self.kind, why))
        return BoundSlices(self, model, options, example, ignored)


class BoundSlices(BoundShape):
    """How many heads or units of one model's layers stay, and from where in their order."""

    def __init__(
        self,
        cut: Heads | Units,
        model: nn.Module,
        options: Mapping[str, tuple[int, ...]],
        example: Tensor,
        ignored: Sequence[Ignored],
    ) -> None:
        self.kind, heads = cut.kind, isinstance(cut, Heads)
        self.keep = keep_heads if heads else keep_units
        decisions: list[Decision] = []
        reach: dict[str, tuple[str, ...]] = {}
        parts = anatomy(model)
        layers = [layer for layer in parts.layers if layer.path in options]
        for layer in layers:
            path, counts = layer.path, options[layer.path]
            own = ordinal(f"{self.kind}:{path}", *counts)
            decisions.append(own)
            names: tuple[str, ...] = (own.name,)
            if cut.windows > 1:
                starts = [i / (cut.windows - 1) for i in range(cut.windows)]
                where = ordinal(f"window:{path}.{self.kind}", *starts, when={own.name: counts[:-1]})
                decisions.append(where)
                names = (own.name, where.name)
            for leaf in inside(parts, layer, "attention" if heads else "feed"):
                reach[leaf] = names
        super().__init__(model, decisions, reach, ignored=ignored)
        self._prepare(cut, layers, example if cut.calibration is None else cut.calibration)

    def _prepare(self, cut: Heads | Units, layers: Sequence[Layer], inputs: Tensor) -> None:
        """The order of each layer's parts, ascending: the most important last."""
        part = "out" if isinstance(cut, Heads) else "down"
        compensated = cut.importance == "compensated" and cut.scores is None
        self.compensation: Compensation | None = None
        self.note = ""
        if (cut.compensate or compensated) and layers:
            if fits(layers, part, anatomy(self.model).width):
                self.compensation = Compensation(self.model, inputs, part, layers)
            else:
                self.note = "too wide to compensate: parts are ordered by what they give"
        if compensated and self.compensation is not None:
            self.order = {la.path: self.compensation.order(self.model, la) for la in layers}
        else:
            kind: Any = "activation" if cut.importance == "compensated" else cut.importance
            find = head_scores if isinstance(cut, Heads) else unit_scores
            scores = cut.scores or (find(self.model, inputs, kind) if layers else {})
            self.order = {
                la.path: torch.argsort(scores[la.path], dim=-1, stable=True) for la in layers
            }
        if not cut.compensate:
            self.compensation = None

    def kept(self, path: str, choices: Choices) -> Tensor:
        """Which heads or units of a layer stay (k,), by number; (experts, k) in a mixture."""
        order = self.order[path]
        count = int(cast(int, choices.get(f"{self.kind}:{path}", order.shape[-1])))
        start = choices.get(f"window:{path}.{self.kind}", 1.0)
        begin = round(float(cast(float, start)) * (order.shape[-1] - count))
        return order[..., begin : begin + count].sort(-1).values

    def apply(self, model: nn.Module, choices: Choices) -> None:
        """Cut the layers that are still there."""
        now = anatomy(model)
        for number, layer, kind, _ in self.places_of(choices):
            part = now.layers[number].attention if kind == "heads" else now.layers[number].feed
            if kind == self.kind and part is not None:
                kept = self.kept(layer.path, choices)
                if kept.dim() > 1 and isinstance(part, Experts) and len(kept) != part.count:
                    raise EspalierError("units of experts are cut before experts are taken out")
                if self.compensation is not None:
                    self.compensation.apply(model, layer.path, now.layers[number], kept)
                self.keep(model, number, kept)


def _check(importance: str, windows: int) -> None:
    if importance not in ORDERS:
        raise EspalierError(unknown("importance", importance, ORDERS))
    if windows < 1:
        raise EspalierError(f"windows are 1 (the most important first) or more, got {windows}")


def _mixed(layer: Layer) -> bool:
    return isinstance(layer.feed, Experts)
