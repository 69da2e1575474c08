"""How many channels, or heads, of each group stay."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from espalier.compress.attention import Attention
from espalier.compress.coupling.discovery import Retold, discover
from espalier.compress.coupling.groups import Group, cut, kept_rows, set_number
from espalier.compress.coupling.labelling import evaluated
from espalier.compress.coupling.sizes import resize
from espalier.compress.coupling.tracing import traced
from espalier.compress.cut import BoundCut, Cut, Ignored
from espalier.compress.importance import KINDS, scores
from espalier.compress.narrow import narrow
from espalier.errors import EspalierError, unknown
from espalier.export.placing import put
from espalier.space import Decision, Ordinal
from espalier.space.options import Option

PREFIX = "width:"
_CHOICES = 4  # numbers of units to choose among, where kernels' multiples would leave fewer


@dataclass(frozen=True)
class Widths(Cut):
    """Channels and heads, one decision a group of coupled ones; an option is how many units stay.

    - `multiple`: channels left are a multiple of this; by default of 8 in groups of 32 or more, of 4
      in groups of 16 or more, so that kernels run at full speed, of less where that would leave
      hardly a choice. Heads count one by one.
    - `least`: the least share that may be left. `steps`: options of a decision, at the most.
    - `importance`: which channels go first ("magnitude", "bn", "taylor", "activation", see
      `importance.scores`). The last two need data: until `with_scores` the order is by magnitude.
    - `scores`: importance of each unit by group, from elsewhere; those of groups that can't be cut
      are not read.
    - `heads`: whether attention heads are cut.

    Errors: `EspalierError` for settings out of range, and for models that can't be run.
    """

    multiple: int | None = None
    least: float = 0.125
    steps: int = 8
    importance: str = "taylor"
    scores: Mapping[str, Tensor] | None = None
    heads: bool = True
    kind: ClassVar[str] = "width"

    def __post_init__(self) -> None:
        if self.importance not in KINDS:
            raise EspalierError(unknown("importance", self.importance, KINDS))
        if not 0 < self.least <= 1:
            raise EspalierError(f"least is a share above 0, at most 1, got {self.least!r}")
        if self.steps < 2:
            raise EspalierError(f"steps counts options, at least 2, got {self.steps!r}")
        if self.multiple is not None and self.multiple < 1:
            raise EspalierError(f"multiple is a whole number from 1, got {self.multiple!r}")

    def bind(self, model: nn.Module, example: Tensor) -> BoundWidths:
        """The groups of a model, found by runs on the example's first two rows."""
        found = discover(model, _few(model, example), self._unwanted)
        kind = self.importance if self.importance == "bn" else "magnitude"
        given = scores(model, found.groups, kind)
        left_alone = {row.layer for row in found.ignored}
        given.update(
            {
                k: v
                for k, v in (self.scores or {}).items()
                if k in found.groups or k not in left_alone
            }
        )
        decisions = tuple(
            Ordinal(PREFIX + name, self.options(group)) for name, group in found.groups.items()
        )
        bound = BoundWidths(found.groups, {}, decisions, found.ignored, found.ends, found.traced)
        return bound.with_scores(given)

    def _unwanted(self, group: Group) -> str:
        if group.units < 2:
            return "its channels can only go all at once"
        if group.heads and not self.heads:
            return "attention heads are left alone (heads=False)"
        if len(self.options(group)) < 2:
            return f"too few channels for a multiple of {self.multiple or 1}"
        return ""

    def options(self, group: Group) -> tuple[int, ...]:
        """How many units may stay, ascending; the last is all."""
        unit = min(m.rows.shape[1] for m in group.members)
        step = 1
        if not group.heads:
            wanted = self.multiple or _usual(group.units, unit)
            step = wanted // math.gcd(wanted, unit)
        least = max(1, math.ceil(self.least * group.units / step)) * step
        places = torch.linspace(self.least * group.units, group.units, self.steps)
        counts = {max(least, round(float(p) / step) * step) for p in places}
        return (*sorted(c for c in counts if c < group.units), group.units)


def _usual(units: int, unit: int) -> int:
    """The multiple that kernels like, for units of `unit` channels; less where a few units are odd
    numbers of channels (groups of a convolution), so that there is a choice."""
    total = units * unit
    wanted = 8 if total >= 32 else 4 if total >= 16 else 1
    while wanted > 1 and wanted // math.gcd(wanted, unit) * _CHOICES > units:
        wanted //= 2
    return wanted


def _few(model: nn.Module, example: Tensor) -> Tensor:
    """Two rows of the example; all of it where the model takes no other number."""
    if len(example) <= 2:
        return example
    try:
        with evaluated(model), torch.no_grad():
            model(example[:2])
    except Exception:
        return example
    return example[:2]


M = TypeVar("M", bound=nn.Module)


def _copied(layer: M) -> M:
    """A layer with tensors to replace; what it holds is still the original's."""
    made = copy.copy(layer)
    made._parameters, made._buffers = dict(layer._parameters), dict(layer._buffers)
    return made


@dataclass(frozen=True)
class BoundWidths(BoundCut):
    """Widths of one model: `groups`, and in `order` each group's units, most important first."""

    groups: Mapping[str, Group] = field(default_factory=dict)
    order: Mapping[str, Tensor] = field(default_factory=dict)
    decisions: tuple[Decision, ...] = ()
    ignored: tuple[Ignored, ...] = ()
    ends: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    traced: Mapping[str, Retold] = field(default_factory=dict)

    def with_scores(self, given: Mapping[str, Tensor]) -> BoundWidths:
        """The same groups with their units in another order; groups without scores keep theirs.

        Errors: `EspalierError` for an unknown group, or scores of another count than its units.
        """
        order = dict(self.order)
        for name, values in given.items():
            if name not in self.groups:
                raise EspalierError(unknown("group", name, self.groups))
            if values.shape != (self.groups[name].units,):
                raise EspalierError(
                    f"scores of {name} are one a unit, ({self.groups[name].units},), got "
                    f"{tuple(values.shape)}"
                )
            order[name] = values.detach().cpu().argsort(descending=True, stable=True)
        return replace(self, order=order)

    def kept(
        self, choices: Mapping[str, Option], names: Iterable[str] | None = None
    ) -> dict[str, Tensor]:
        """The units that stay, ascending, of each group (or of those named) that `choices` cut."""
        found = {}
        for name in self.groups if names is None else names:
            group = self.groups[name]
            count = choices.get(PREFIX + name, group.units)
            if not isinstance(count, int) or not 1 <= count <= group.units:
                raise EspalierError(f"{PREFIX}{name} keeps 1 to {group.units} units, got {count!r}")
            if count < group.units:
                found[name] = self.order[name][:count].sort().values
        return found

    def apply(self, model: nn.Module, choices: Mapping[str, Option]) -> None:
        """Cut a deep copy of the bound model in place, to the chosen numbers of units."""
        kept = self.kept(choices)
        for path, retold in self.traced.items():
            if not retold.groups.isdisjoint(kept):
                graph = traced(model.get_submodule(path))
                resize(graph, retold.sizes)
                put(model, path, graph)
        cut(model, self.groups, kept)

    def layers(self) -> Mapping[str, tuple[str, ...]]:
        """Layer (its path) -> the decisions that decide its weights', inputs' or outputs' shape."""
        found: dict[str, list[str]] = {path: list(names) for path, names in self.ends.items()}
        for name, group in self.groups.items():
            for member in group.members:
                for path, _ in member.owners:
                    found.setdefault(path, []).append(name)
            for number in group.numbers:
                found.setdefault(number.path, []).append(name)
        return {p: tuple(PREFIX + n for n in dict.fromkeys(ns)) for p, ns in found.items() if ns}

    def slice(self, name: str, layer: nn.Module, choices: Mapping[str, Option]) -> nn.Module | None:
        """One layer with the chosen widths; the layer itself where nothing of it is cut."""
        inner = f"{name}.out_proj"
        attention = isinstance(layer, nn.MultiheadAttention)
        names = self._cutting.get(name, []) + (self._cutting.get(inner, []) if attention else [])
        kept = self.kept(choices, dict.fromkeys(names))
        rows = kept_rows(self.groups, kept, (name, inner))
        if isinstance(layer, nn.MultiheadAttention) and (name in rows or inner in rows):
            layer = Attention(layer)
            layer.out_proj = _copied(layer.out_proj)
            narrow(layer.out_proj, rows.get(inner, {}))
        numbers = [
            (number, self.groups[group].scaled(number, len(units)))
            for group, units in kept.items()
            for number in self.groups[group].numbers
            if number.path == name
        ]
        if name not in rows and not numbers:
            return layer
        made = _copied(layer)
        narrow(made, rows.get(name, {}))
        for number, value in numbers:
            set_number(made, number.name, value)
        return made

    @cached_property
    def _cutting(self) -> dict[str, list[str]]:
        """The groups that cut tensors of a module, or its numbers."""
        found: dict[str, list[str]] = {}
        for name, group in self.groups.items():
            paths = {path for m in group.members for path, _ in m.owners}
            for path in paths | {number.path for number in group.numbers}:
                found.setdefault(path, []).append(name)
        return found
