"""The additive pieces of a trained model under cuts: for tables of costs.

A unit is a leaf layer with the norm, activation and pooling that directly follow it. A module that
multiplies outside of its layers (attention) is one unit; what else holds weights (a class token) is a
unit that only counts. Layers are cut alone by the cuts' `slice`; what does not tell its own input's
shape is looked up on a model built with the few decisions that change it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from espalier.compress.calls import Shape, follow
from espalier.compress.cut import BoundCut
from espalier.compress.pieces.beside import Beside
from espalier.compress.pieces.divided import Division, Piece, joined, others, places_of, told
from espalier.compress.pieces.outline import outline
from espalier.compress.pieces.run import Run, batch_dims
from espalier.compress.pieces.standing import (
    AsCalled,
    Held,
    borrowed,
    emptied,
    fed,
    main_tensor,
    tied,
)
from espalier.compress.pieces.turns import Turns
from espalier.costs.rows import Rows
from espalier.errors import SpaceError, unknown
from espalier.space import Decision, Option

_VALUES = ("bits", "sparsity")  # kinds of cut that change no shape at all
_SAME_SHAPES = ("depth", *_VALUES)  # kinds of cut that keep shapes between layers
_BARE = ("width", "depth")  # kinds of cut that read no values where a layer is cut
_KEPT, _ROOM = 16, 2e9  # models built to look at that are kept: so many, in so many bytes

Choices = Mapping[str, Option]


@dataclass(frozen=True)
class Unit:
    """One piece. Its module and its input's shape hang on `decisions` alone. `turn`: which of its
    module's calls it is, from 0; those after the first hold no weights."""

    name: str
    decisions: tuple[str, ...]
    turn: int = 0


class Units:
    """The pieces of one model, and how to get each alone under any choices.

    `build(choices, model)` gives the model (or its outline) cut by these choices, the others being the
    original's.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Tensor,
        cuts: Sequence[BoundCut],
        build: Callable[[Choices, nn.Module], nn.Module],
    ) -> None:
        self._model, self._example, self._cuts, self._build = model, example, cuts, build
        self._original = {d.name: d.options[-1] for cut in cuts for d in cut.decisions}
        self._layers = [cut.layers() for cut in cuts]
        self._tied = tied(model)
        self._runs: OrderedDict[tuple[Any, ...], Run] = OrderedDict()
        size = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
        self._kept = int(min(max(_ROOM / max(size, 1), 2), _KEPT))
        self._shapes: dict[tuple[Any, ...], dict[tuple[str, int], Shape]] = {}
        self._made: dict[str, list[Shape]] = {}
        self._slices: dict[tuple[Any, ...], tuple[nn.Module | None, Shape | None]] = {}
        run = follow(model, example)
        self._outline = outline(model, example, run)
        self._pieces = {p.name: p for p in Division(model, run, self._layers).pieces}
        self._batch_dims = batch_dims(model, example, self._pieces.values())
        for piece in self._pieces.values():
            piece.decisions |= self._claims(piece)
        known = self._outline
        self._probe(Run(known.model, known.example) if known else Run(model, example))
        widths = [d for d in self._shaping() if isinstance(d.options[-1], int)]
        self._beside = Beside(
            run,
            list(self._pieces.values()),
            widths,
            self._makes,
        )
        for piece in self._pieces.values():
            piece.decisions |= self._beside.decisions(piece)
        self._turns = Turns(
            run, cuts, self._layers, partial(self._sliced, without=_VALUES, bare=True)
        )
        order = {name: i for i, name in enumerate(self._original)}
        decided = {name: piece.decisions for name, piece in self._pieces.items()}
        turns = {name: piece.turn for name, piece in self._pieces.items()}
        self._units = tuple(
            Unit(name, tuple(sorted(decisions, key=order.__getitem__)), turns.get(name, 0))
            for name, decisions in (decided | self._turns.decisions).items()
        )

    def units(self) -> tuple[Unit, ...]:
        """The pieces, in the order in which they run."""
        return self._units

    def unit(
        self, name: str, candidate: Choices, bare: bool = False
    ) -> tuple[nn.Module, Shape] | None:
        """A piece as a module of its own and its input's shape; None where it does not run.

        A `bare` one may be without values, on torch's meta device: for what only asks for shapes.
        Errors: `SpaceError` for an unknown name.
        """
        if name in self._turns:
            return self._turns.unit(name, candidate)
        if name not in self._pieces:
            raise SpaceError(unknown("unit", name, self._pieces))
        piece = self._pieces[name]
        found = self._alone(piece, candidate, bare)
        beside = self._beside.bytes(piece, candidate) if found else 0
        if found is None or not beside:
            return found
        carrier: Any = found[0]
        if not isinstance(carrier, Rows):  # the module itself may be the model's own
            carrier = nn.Sequential(carrier)
        carrier.beside_bytes = beside
        return carrier, found[1]

    def _alone(
        self, piece: Piece, candidate: Choices, bare: bool
    ) -> tuple[nn.Module, Shape] | None:
        if piece.kind == "chain":
            return self._chained(piece, candidate, bare)
        if piece.kind == "held":
            return self._held(piece, candidate)
        choices = {d: candidate.get(d, self._original[d]) for d in piece.decisions}
        return self._called(piece, choices)

    # --- what decides a piece --------------------------------------------------------------------

    def _claims(self, piece: Piece) -> set[str]:
        """The decisions of its layers."""
        inside = [p + "." if p else "" for p in piece.paths] if piece.kind == "call" else []
        return {
            name
            for layers in self._layers
            for path, names in layers.items()
            if path in piece.paths or any(path.startswith(p) for p in inside)
            for name in names
        }

    def _probe(self, original: Run) -> None:
        """Adds what changes the inputs of pieces beside what they tell, found by changing each."""
        open_ = [p for p in self._pieces.values() if not self._tells_all(p)]
        silent = any(self._places(p) is None for p in open_)
        for decision in self._shaping() if open_ else ():
            self._makes(decision)  # the same run tells both
            run = self._shown({decision.name: decision.options[0]})
            for piece in open_:
                if run.looks(piece) in (None, original.looks(piece)):
                    continue
                if (places := self._places(piece)) is None:
                    piece.decisions.add(decision.name)
                elif others(run.taken(piece), places) != others(original.taken(piece), places):
                    piece.decisions.add(decision.name)
                    piece.moving.add(decision.name)
            if not silent:
                self._runs.clear()  # hardly anything is looked up on it again: room matters more

    def _makes(self, decision: Decision) -> list[Shape]:
        """The shapes of what every operation makes under a decision's first option."""
        if decision.name not in self._made:
            self._made[decision.name] = self._shown({decision.name: decision.options[0]}).made()
        return self._made[decision.name]

    def _shaping(self) -> list[Decision]:
        """The decisions that may change shapes between layers."""
        every = [d for cut in self._cuts for d in cut.decisions if d.count > 1]
        return [d for d in every if d.name.partition(":")[0] not in _SAME_SHAPES]

    def _places(self, piece: Piece, place: int = 0) -> tuple[int, ...] | None:
        """Where a layer of a chain tells its input's shape; None where it does not."""
        if piece.kind != "chain":
            return None
        return places_of(self._model.get_submodule(piece.paths[place]), piece.shapes[place])

    def _tells_all(self, piece: Piece) -> bool:
        """Whether it tells its input's shape but the batch."""
        places = self._places(piece)
        return places is not None and others(piece.shapes[0], places) == (1,)

    # --- getting a piece -------------------------------------------------------------------------

    def _chained(
        self, piece: Piece, candidate: Choices, bare: bool
    ) -> tuple[nn.Module, Shape] | None:
        found: list[nn.Module] = []
        shape: Shape | None = None
        bare = bare and not any(self._reads_values(path, candidate) for path in piece.paths)
        for i, path in enumerate(piece.paths):
            layer, taken = self._sliced(path, piece.shapes[i], candidate, bare=bare)
            if layer is None:
                continue
            if not found:
                shape = self._input(piece, i, taken, candidate)
            # what follows a layer is not there for a second time where it holds weights
            found.append(self._own(layer, path, piece.turn > 0 and i == 0))
        if not found or shape is None:
            return None
        module = found[0] if len(found) == 1 else nn.Sequential(*found)
        return fed(module, shape, self._batch_dims.get(piece.name, 0))

    def _sliced(
        self,
        path: str,
        shape: Shape,
        candidate: Choices,
        without: Sequence[str] = (),
        bare: bool = False,
    ) -> tuple[nn.Module | None, Shape | None]:
        """A leaf layer under the candidate (`without` cuts of these kinds), and its input's shape
        where it tells that; `bare` is without values, where the model has an outline."""
        cuts = self._cuts_of(path, candidate, without)
        if not bare or self._outline is None:
            return _cut(self._model.get_submodule(path), path, shape, cuts)
        key = (path, shape, *(pair for _, choices in cuts for pair in choices.items()))
        if key not in self._slices:
            layer = self._outline.model.get_submodule(path)
            self._slices[key] = _cut(layer, path, shape, cuts)
        return self._slices[key]

    def _cuts_of(
        self, path: str, candidate: Choices, without: Sequence[str] = ()
    ) -> list[tuple[BoundCut, Choices]]:
        """The cuts that change a module, each with what is chosen of it."""
        found: list[tuple[BoundCut, Choices]] = []
        for cut, layers in zip(self._cuts, self._layers, strict=True):
            names = layers.get(path, ()) if _kind(cut) not in without else ()
            choices = {n: candidate.get(n, self._original[n]) for n in names}
            if any(choices[n] != self._original[n] for n in names):
                found.append((cut, choices))
        return found

    def _reads_values(self, path: str, candidate: Choices) -> bool:
        """Whether a cut of a module reads what its weights are."""
        return any(_kind(cut) not in _BARE for cut, _ in self._cuts_of(path, candidate))

    def _input(
        self, piece: Piece, place: int, taken: Shape | None, candidate: Choices
    ) -> Shape | None:
        """The input's shape of a layer: what it tells, or what is looked up, or some of both."""
        places = self._places(piece, place)
        if taken is None or places is None:
            return self._looked_up(piece, place, piece.decisions, candidate)
        looked = self._looked_up(piece, place, piece.moving, candidate) if piece.moving else None
        return joined(taken, looked, places) if looked and len(looked) == len(taken) else taken

    def _looked_up(
        self, piece: Piece, place: int, names: Iterable[str], candidate: Choices
    ) -> Shape | None:
        """The input's shape of a layer on a model built for what these decisions are."""
        choices = {
            d: candidate.get(d, self._original[d])
            for d in names
            if d.partition(":")[0] not in _SAME_SHAPES
        }
        key = self._key(choices)
        if key not in self._shapes:
            self._shapes[key] = self._shown(choices).shapes()
        return self._shapes[key].get((piece.paths[place], piece.turn if place == 0 else 0))

    def _called(self, piece: Piece, choices: Choices) -> tuple[nn.Module, Shape] | None:
        call = self._run(choices).call(piece)
        if call is None or emptied(self._model.get_submodule(piece.paths[0]), call.module):
            return None
        module = self._own(call.module, piece.paths[0], piece.turn > 0)
        dim = self._batch_dims.get(piece.name, 0)
        if call.single:
            return fed(module, call.shape, dim)
        x = main_tensor(call)
        return fed(AsCalled(module, call.args, call.kwargs, x, dim), tuple(x.shape), dim)

    def _held(self, piece: Piece, candidate: Choices) -> tuple[nn.Module, Shape] | None:
        path = piece.paths[0]
        module: nn.Module | None = self._model.get_submodule(path)
        for cut, choices in self._cuts_of(path, candidate):
            if module is not None:
                module = cut.slice(path, module, choices)
        if module is None or emptied(self._model.get_submodule(path), module):
            return None
        return Held(self._own(module, path, False)), (1,)

    def _own(self, module: nn.Module, path: str, again: bool) -> nn.Module:
        """The module; weights that an earlier one holds are turned into what is not counted."""
        prefix = f"{path}." if path else ""
        names = [n for n, _ in module.named_parameters() if again or prefix + n in self._tied]
        return borrowed(module, names) if names else module

    # --- models built to look at -----------------------------------------------------------------

    def _key(self, choices: Choices) -> tuple[Any, ...]:
        return tuple(sorted((n, c) for n, c in choices.items() if c != self._original[n]))

    def _run(self, choices: Choices, bare: bool = False) -> Run:
        key = (bare, *self._key(choices))
        if key not in self._runs:
            while len(self._runs) >= self._kept:
                self._runs.popitem(last=False)
            self._runs[key] = self._outlined(choices) if bare else self._built(choices)
        self._runs.move_to_end(key)
        return self._runs[key]

    def _shown(self, choices: Choices) -> Run:
        """A run for shapes alone."""
        return self._run(choices, bare=self._outline is not None)

    def _built(self, choices: Choices) -> Run:
        return Run(self._build(choices, self._model), self._example)

    def _outlined(self, choices: Choices) -> Run:
        assert self._outline is not None
        try:
            shown = Run(self._build(choices, self._outline.model), self._outline.example)
            shown.shapes()
        except Exception:  # a cut that reads values, or makes the model read them
            return self._built(choices)
        return shown


def _kind(cut: BoundCut) -> str:
    return cut.decisions[0].name.partition(":")[0] if cut.decisions else ""


def _cut(
    layer: nn.Module | None, path: str, shape: Shape, cuts: Sequence[tuple[BoundCut, Choices]]
) -> tuple[nn.Module | None, Shape | None]:
    """A layer as cuts leave it, None where it is left out, and the input's shape that it tells."""
    assert layer is not None
    places = places_of(layer, shape)
    taken = told(layer, shape, places)
    for cut, choices in cuts:
        layer = cut.slice(path, layer, choices)
        if layer is None:
            return None, None
        taken = told(layer, shape, places) or taken
    return layer, taken
