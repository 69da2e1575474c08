"""Where numbers may change kind between the layers of a model: pieces of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from espalier.compress.calls import Call, Pass, Shape, Value
from espalier.compress.cut import BoundCut
from espalier.compress.pieces.divided import Layers
from espalier.compress.pieces.standing import fed
from espalier.costs.turn import Turn
from espalier.space import Option

Choices = Mapping[str, Option]
# A layer under a candidate, None where it is left out, and its input's shape.
Sliced = Callable[[str, Shape, Choices], tuple[nn.Module | None, Shape | None]]
_SOURCES = 2  # where a tensor's last layer is left out, the one before counts


@dataclass(frozen=True)
class _Place:
    """A tensor between convolutions: those that it comes from, the last first, and those that it meets:
    that read it or, where it is `joined`, whose outputs are added to it."""

    sources: tuple[str, ...]
    others: tuple[str, ...]
    joined: bool


class Turns:
    """The places between convolutions where a candidate's bits may change kind.

    A tensor that comes from several layers, as sums do, has the kind of the last of them; where the
    others are of another kind, there is a turn at the sum. `sliced` gives a layer under a candidate.
    """

    def __init__(
        self,
        run: Pass,
        cuts: Sequence[BoundCut],
        layers: Sequence[Layers],
        sliced: Sliced,
    ) -> None:
        self._kinds: list[Any] = [cut for cut in cuts if hasattr(cut, "whole")]
        self._bits = {path: names for cut in self._kinds for path, names in cut.layers().items()}
        self._layers, self._sliced = layers, sliced
        self._original = {d.name: d.options[-1] for cut in cuts for d in cut.decisions}
        self._first = {d.name: d.options[0] for cut in cuts for d in cut.decisions}
        calls = {c.path: c for c in run.calls if isinstance(c.module, nn.Conv2d)}
        self._calls: dict[str, Call] = {p: c for p, c in calls.items() if len(run.of(p)) == 1}
        self._known: dict[Any, tuple[Shape, Shape] | None] = {}
        self._places: dict[str, _Place] = {}
        if self._kinds:
            self._find(run)
        self.decisions = {name: self._decided(place) for name, place in self._places.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def unit(self, name: str, candidate: Choices) -> tuple[nn.Module, Shape] | None:
        """The turn at a place and its tensor's shape; None where all are of one kind there."""
        place = self._places[name]
        source = next((s for s in place.sources if self._runs(s, candidate)), None)
        others = [o for o in place.others if self._runs(o, candidate)]
        if source is None or not others:
            return None
        whole = self._whole(source, candidate)
        if all(self._whole(other, candidate) == whole for other in others):
            return None
        return fed(Turn(), self._shape(place, candidate))

    # --- where ---------------------------------------------------------------------------------

    def _find(self, run: Pass) -> None:
        inside = self._inside(run)
        sources: dict[Value, tuple[str, ...]] = {}
        made: dict[Value, int] = {}
        for i, step in enumerate(run.steps):
            if step.made is None:
                continue
            if i in inside:
                sources[step.made] = (inside[i],)
            else:
                read = sorted(step.reads, key=lambda v: -made.get(v, -1))
                found = [s for v in read if (s := sources.get(v))]
                self._join(found)
                sources[step.made] = _merged(found)
            made[step.made] = i
        readers: dict[Value, list[str]] = {}
        for path, call in self._calls.items():
            if call.taken is not None:
                readers.setdefault(call.taken, []).append(path)
        for value, paths in readers.items():
            if from_ := sources.get(value):
                self._add(f"{from_[0]} to {paths[0]}", _Place(from_, tuple(paths), joined=False))

    def _inside(self, run: Pass) -> dict[int, str]:
        """The steps of convolutions, and whose they are."""
        places = {id(call): path for path, call in self._calls.items()}
        own = {i: places[id(c)] for i, c in enumerate(run.calls) if id(c) in places}
        return {i: own[step.call] for i, step in enumerate(run.steps) if step.call in own}

    def _join(self, found: Sequence[tuple[str, ...]]) -> None:
        for other in found[1:]:
            if other[0] != found[0][0]:
                name = f"{found[0][0]} with {other[0]}"
                self._add(name, _Place(found[0][:1], other[:1], joined=True))

    def _add(self, name: str, place: _Place) -> None:
        if any(path in self._bits for path in (*place.sources[:1], *place.others)):
            self._places[name] = place

    # --- what decides it -----------------------------------------------------------------------

    def _names(self, path: str) -> list[str]:
        return [n for layers in self._layers for n in layers.get(path, ())]

    def _decided(self, place: _Place) -> set[str]:
        """The kinds of the layers that meet, what leaves them out, and what decides the shape."""
        kinds = {name for names in self._bits.values() for name in names}
        found, shapes = set[str](), set[str]()
        for path in (*place.sources, *place.others):
            for name in self._names(path):
                (found if name in kinds or name.startswith("depth:") else shapes).add(name)
        whole = self._shape(place, self._original)
        for name in shapes:
            if self._shape(place, {**self._original, name: self._first[name]}) != whole:
                found.add(name)
        return found

    def _runs(self, path: str, candidate: Choices) -> bool:
        return self._looked_at(path, candidate) is not None

    def _looked_at(self, path: str, candidate: Choices) -> tuple[Shape, Shape] | None:
        """What a convolution takes and gives under a candidate; None where it is left out."""
        names = (n for n in self._names(path) if n not in self._bits.get(path, ()))
        key = path, *((n, candidate.get(n)) for n in names)
        if key not in self._known:
            call = self._calls[path]
            layer: Any
            layer, taken = self._sliced(path, call.shape, candidate)
            rows, _, *places = call.out_shape
            made = () if layer is None else (rows, int(layer.out_channels), *places)
            self._known[key] = None if layer is None or taken is None else (taken, made)
        return self._known[key]

    def _whole(self, path: str, candidate: Choices) -> bool:
        return any(cut.whole(path, candidate) for cut in self._kinds)

    def _shape(self, place: _Place, candidate: Choices) -> Shape:
        """Of what the first reader takes, or of what the last source gives to a sum."""
        if place.joined:
            found = self._looked_at(place.sources[0], candidate)
            return found[1] if found else ()
        every = (self._looked_at(path, candidate) for path in place.others)
        return next((found[0] for found in every if found), ())


def _merged(found: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The first of each, then the rest, once each."""
    firsts = [s[0] for s in found]
    rest = [name for s in found for name in s[1:]]
    return tuple(dict.fromkeys([*firsts, *rest]))[:_SOURCES]
