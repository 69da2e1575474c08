"""Experts of a mixture as decisions: how many stay in each layer, and how many a token gets."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from espalier.compress.cut import BoundCut, Cut, Ignored
from espalier.compress.language.anatomy import Experts as Mixture
from espalier.compress.language.anatomy import anatomy
from espalier.compress.language.experts.merging import STACKS, absorbed, chosen, merge_experts
from espalier.compress.language.experts.refit import refit_in_turn
from espalier.compress.language.experts.routing import ORDERS, Routing, routing
from espalier.compress.language.shape.surgery import keep_experts, set_active
from espalier.errors import EspalierError, unknown
from espalier.space import ordinal
from espalier.space.options import Option


@dataclass(frozen=True)
class Experts(Cut):
    """How many experts of each mixture stay: "experts:model.layers.3".

    - `options`: counts to choose from; by default a quarter, a half and three quarters of them, no
      fewer than a token gets. All, the original, is always among them.
    - `order`: who goes last: "reap" (mean over its tokens of gate times size of output), "frequency"
      (share of tokens it gets) or "soft" (mean probability).
    - `merge`: those that go are averaged into the kept one whose outputs are most alike, by
      frequency; otherwise they are gone.
    - `refit`: the last maps of those that stay are fitted, in closed form, to what the layer gave.
    - `calibration`: inputs of the model; by default the example it is bound with.
    """

    kind: ClassVar[str] = "experts"
    options: Sequence[int] | None = None
    order: str = "reap"
    merge: bool = False
    refit: bool = True
    calibration: Tensor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise EspalierError(unknown("order of experts", self.order, ORDERS))
        for count in self.options or ():
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise EspalierError(f"counts of experts are whole numbers from 1, got {count!r}")
        if self.options is not None:
            object.__setattr__(self, "options", tuple(sorted(set(self.options))))

    def bind(self, model: nn.Module, example: Tensor) -> BoundExperts:
        """The mixtures of a model. Errors: `EspalierError`."""
        windows = example if self.calibration is None else self.calibration
        return BoundExperts(self, model, windows)

    def counts(self, mixture: Mixture) -> tuple[int, ...]:
        """The options of one mixture, ascending."""
        n = mixture.count
        quarters = [max(mixture.active, -(-n * q // 4)) for q in (1, 2, 3)]
        given = quarters if self.options is None else self.options
        return tuple(sorted({*(k for k in given if k < n), n}))


def _make(
    model: nn.Module, changes: Mapping[int, Callable[[], None]], windows: Tensor | None
) -> None:
    """Changes mixtures, by layer; with windows, what stays is fitted to what the layer gave."""
    if windows is None:
        for change in changes.values():
            change()
    elif changes:
        refit_in_turn(model, windows, changes)


class _BoundMixtures(BoundCut):
    """What decisions on mixtures share: which layers have one, and where."""

    kind: ClassVar[str]

    def __init__(self, model: nn.Module, ignored: Sequence[Ignored] = ()) -> None:
        found = {layer.path: layer.feed for layer in anatomy(model).layers}
        self.mixtures = {path: f for path, f in found.items() if isinstance(f, Mixture)}
        dense = [p for p, f in found.items() if f is not None and p not in self.mixtures]
        self.ignored = (*ignored, *(Ignored(p, self.kind, "it has no experts") for p in dense))

    def layers(self) -> dict[str, tuple[str, ...]]:
        """The router and the stacked experts of each mixture -> its decision."""
        return {
            path: (d.name,)
            for d in self.decisions
            for mixture in [self.mixtures[d.name.partition(":")[2]]]
            for path in (f"{mixture.path}.experts", mixture.router)
        }

    def _wanted(
        self, model: nn.Module, choices: Mapping[str, Option]
    ) -> list[tuple[int, str, int]]:
        """(layer's number now, its path, count) of the mixtures that are to change."""
        now = anatomy(model).layers
        every = {d.name.partition(":")[2]: (d, choices.get(d.name)) for d in self.decisions}
        found = []
        for number, layer in enumerate(now):
            decision, option = every.get(layer.path, (None, None))
            if decision is None or option is None or option == decision.options[-1]:
                continue
            if isinstance(layer.feed, Mixture):
                count: Any = option
                found.append((number, layer.path, int(count)))
        return found

    def _option(self, path: str, choices: Mapping[str, Option]) -> int | None:
        """What was chosen for the mixture that a module belongs to; None where all stays."""
        for decision in self.decisions:
            mixture = self.mixtures[decision.name.partition(":")[2]]
            option: Any = choices.get(decision.name, decision.options[-1])
            if path in (f"{mixture.path}.experts", mixture.router):
                return None if option == decision.options[-1] else int(option)
        return None


class BoundExperts(_BoundMixtures):
    """How many experts one model's mixtures keep."""

    kind = Experts.kind

    def __init__(self, cut: Experts, model: nn.Module, windows: Tensor) -> None:
        super().__init__(model)
        self.cut, self.windows = cut, windows
        self.decisions = tuple(
            ordinal(f"{self.kind}:{path}", *options)
            for path, mixture in self.mixtures.items()
            if len(options := cut.counts(mixture)) > 1
        )
        self.routing: dict[str, Routing] = routing(model, windows) if self.decisions else {}

    def order(self, path: str) -> Tensor:
        """The experts of a layer (its path), most important first."""
        score: Tensor = getattr(self.routing[path], self.cut.order)
        return score.argsort(descending=True, stable=True)

    def apply(self, model: nn.Module, choices: Mapping[str, Option]) -> None:
        """Keeps the first experts of each mixture, by their order; they stay in their sequence."""
        changes = {
            number: partial(self._fewer, model, number, path, count)
            for number, path, count in self._wanted(model, choices)
        }
        _make(model, changes, self.windows if self.cut.refit else None)

    def _fewer(self, model: nn.Module, number: int, path: str, count: int) -> None:
        kept = self.order(path)[:count].sort().values
        if self.cut.merge:
            seen = self.routing[path]
            mix = absorbed(kept, seen.alike, seen.frequency)
            merge_experts(model, number, mix, chosen(kept, mix.shape[1]))
        else:
            keep_experts(model, number, kept)

    def slice(self, name: str, layer: nn.Module, choices: Mapping[str, Option]) -> nn.Module | None:
        """The stacked experts, or the router, with as many as are chosen."""
        count = self._option(name, choices)
        if count is None:
            return layer
        twin: Any = copy.deepcopy(layer)
        with torch.no_grad():
            for part in (*STACKS, "weight"):
                if hasattr(twin, part):
                    setattr(twin, part, nn.Parameter(getattr(twin, part)[:count].clone()))
        twin.num_experts = count
        if hasattr(twin, "top_k"):
            twin.top_k = min(twin.top_k, count)
        made: nn.Module = twin
        return made


@dataclass(frozen=True)
class ActiveExperts(Cut):
    """How many experts a token gets in each mixture: "active:model.layers.3", from 1 to the model's
    own number; `options` names some of these. `refit`, `calibration`: as of `Experts`."""

    kind: ClassVar[str] = "active"
    options: Sequence[int] | None = None
    refit: bool = True
    calibration: Tensor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        for count in self.options or ():
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise EspalierError(f"experts a token gets are whole numbers from 1, got {count!r}")

    def bind(self, model: nn.Module, example: Tensor) -> BoundActive:
        """The mixtures of a model. Errors: `EspalierError`."""
        windows = example if self.calibration is None else self.calibration
        return BoundActive(self, model, windows)


class BoundActive(_BoundMixtures):
    """How many experts a token gets in one model's mixtures."""

    kind = ActiveExperts.kind

    def __init__(self, cut: ActiveExperts, model: nn.Module, windows: Tensor) -> None:
        super().__init__(model)
        self.cut, self.windows = cut, windows
        self.decisions = tuple(
            ordinal(f"{self.kind}:{path}", *options)
            for path, mixture in self.mixtures.items()
            for given in [range(1, mixture.active) if cut.options is None else cut.options]
            if len(options := sorted({*(k for k in given if k < mixture.active), mixture.active}))
            > 1
        )

    def apply(self, model: nn.Module, choices: Mapping[str, Option]) -> None:
        """Sets how many a token gets; no more than there are left."""
        now: Any = anatomy(model).layers
        changes = {
            number: partial(set_active, model, number, min(count, now[number].feed.count))
            for number, _, count in self._wanted(model, choices)
        }
        _make(model, changes, self.windows if self.cut.refit else None)

    def slice(self, name: str, layer: nn.Module, choices: Mapping[str, Option]) -> nn.Module | None:
        """The router with another number; the experts themselves do not change."""
        count = self._option(name, choices)
        if count is None or not hasattr(layer, "top_k"):
            return layer
        twin: Any = copy.deepcopy(layer)
        twin.top_k = count
        made: nn.Module = twin
        return made
