"""What cuts on the weights of a transformer share: their places, their inputs, and the order of work."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from espalier.compress.cut import BoundCut, Ignored
from espalier.compress.language.anatomy import anatomy
from espalier.compress.language.weights.places import Place, grams, places, treat_in_turn
from espalier.errors import EspalierError, unknown
from espalier.space import ordinal
from espalier.space.options import Option

INPUTS = ("changed", "original")


class BoundPlaces(BoundCut):
    """Decisions on the weights of one model's places.

    `windows (n, ...)`: what the places' inputs are taken from. With `inputs` "changed" a place sees
    what the places before it give as the candidate has them; with "original" what they gave in the
    model that was bound, looked at once, and each option's weights are made once and kept.
    """

    kind: ClassVar[str]

    def __init__(
        self,
        model: nn.Module,
        found: Mapping[str, Place],
        options: Mapping[str, Sequence[Option]],
        windows: Tensor,
        inputs: str,
        tables: bool,
        ignored: Sequence[Ignored] = (),
    ) -> None:
        self.model, self.windows, self.inputs, self.tables = model, windows, inputs, tables
        self.places = {name: found[name] for name in options}
        self.decisions = tuple(ordinal(f"{self.kind}:{n}", *of) for n, of in options.items())
        self.ignored = tuple(ignored)
        self._grams: dict[str, dict[str, Tensor]] = {}
        self._made: dict[tuple[str, Option, str], Tensor] = {}

    @abstractmethod
    def treat(self, weight: Tensor, gram: Tensor | None, option: Option) -> Tensor:
        """The new weights `(..., o, d)`, float32 or float64."""

    @abstractmethod
    def needs_inputs(self, option: Option) -> bool:
        """Whether `treat` looks at the Gram matrix."""

    @property
    def note(self) -> str:
        """What must be known of the options; '' where nothing."""
        return ""

    def shapes(self, name: str) -> tuple[tuple[int, ...], ...]:
        """Shapes of the weights that a decision is about, in the bound model: (o, d) or (n, o, d)."""
        return self.places[name.partition(":")[2]].shapes(self.model)

    def layers(self) -> dict[str, tuple[str, ...]]:
        """Module that holds weights -> its decision."""
        return {
            path: (f"{self.kind}:{name}",)
            for name, place in self.places.items()
            for path in place.modules
        }

    def apply(self, model: nn.Module, choices: Mapping[str, Option]) -> None:
        """Changes the weights of every place that is still there, in the order they run."""
        now = places(anatomy(model), self.tables)
        wanted = {n: o for n, o in self._chosen(choices).items() if n in now}
        turn: dict[str, Any] = {}
        for name, option in wanted.items():
            place = now[name]
            if place.table or not self.needs_inputs(option):
                for part, weight in place.read(model).items():
                    place.write(model, part, self.treat(weight, None, option))
            elif self.inputs == "original" and self._unchanged(model, place):
                self._reuse(model, place, option)
            else:
                turn[name] = (place, partial(self._in_turn, option))
        if turn:
            treat_in_turn(model, self.windows, turn)

    def _in_turn(self, option: Option, weight: Tensor, gram: Tensor, part: str) -> Tensor:
        return self.treat(weight, gram, option)

    def _chosen(self, choices: Mapping[str, Option]) -> dict[str, Option]:
        """Place -> option, of those that do not stay as they are."""
        chosen = {d.name.partition(":")[2]: (d, choices.get(d.name)) for d in self.decisions}
        return {
            name: option
            for name, (d, option) in chosen.items()
            if option is not None and option != d.options[-1]
        }

    def _unchanged(self, model: nn.Module, place: Place) -> bool:
        if place.name not in self.places:
            return False
        ours, now = self.places[place.name].read(self.model), place.read(model)
        return all(torch.equal(ours[part], now[part]) for part in ours)

    def _reuse(self, model: nn.Module, place: Place, option: Option) -> None:
        if not self._grams:
            read = [p for p in self.places.values() if not p.table]
            self._grams = grams(self.model, self.windows, read)
        for part, weight in place.read(model).items():
            key = (place.name, option, part)
            if key not in self._made:
                gram = self._grams[place.name][part]
                self._made[key] = self.treat(weight, gram, option).to(weight.dtype)
            place.write(model, part, self._made[key])

    def slice(self, name: str, layer: nn.Module, choices: Mapping[str, Option]) -> nn.Module | None:
        """The layer with its weight changed, without looking at inputs."""
        chosen = self._chosen(choices)
        place = next((p for p in self.places.values() if name in p.modules), None)
        if place is None or place.name not in chosen:
            return layer
        twin: Any = copy.deepcopy(layer)
        with torch.no_grad():
            parts = ("gate_up_proj", "down_proj") if place.experts else ("weight",)
            for part in parts:
                weight = getattr(twin, part)
                flipped = any(w.flipped for w in place.weights)
                view = weight.t() if flipped else weight
                gram = torch.eye(view.shape[-1], dtype=torch.float64).expand(
                    *view.shape[:-2], -1, -1
                )
                view.copy_(self.treat(view, gram, chosen[place.name]))
        made: nn.Module = twin
        return made

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_grams": {}, "_made": {}}


def asked(
    model: nn.Module, tables: bool = False, patterns: Iterable[str] | None = None
) -> dict[str, Place]:
    """The places of a model by name, of those that patterns ask for, as in `fnmatch`; all by default.

    Errors: `EspalierError` where a pattern matches no place.
    """
    every = places(anatomy(model), tables)
    if patterns is None:
        return every
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in every):
            raise EspalierError(unknown("place of weights", pattern, every))
    return {name: p for name, p in every.items() if any(fnmatch(name, q) for q in patterns)}


def check_inputs(inputs: str) -> None:
    """Errors: `EspalierError` for a word that is none of `INPUTS`."""
    if inputs not in INPUTS:
        raise EspalierError(unknown("inputs", inputs, INPUTS))
