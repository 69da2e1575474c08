"""A model that runs once, to see what its pieces take: their shapes, and where the batch stands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from espalier.compress.calls import Call, Pass, Shape, follow
from espalier.compress.pieces.divided import Piece
from espalier.compress.pieces.standing import main_tensor
from espalier.errors import EspalierError


class Run:
    """A model that runs once, when its calls are asked for."""

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        self.model, self._example = model, example
        self._whole: Pass | None = None

    @cached_property
    def _calls(self) -> dict[tuple[str, int], Call]:
        if self._example.is_meta:  # where that costs nothing more
            self.made()
        run = self._whole or follow(self.model, self._example, steps=False)
        return _by_turn(run)

    def made(self) -> list[Shape]:
        """The shapes of what every operation makes."""
        if self._whole is None:
            self._whole = follow(self.model, self._example)
        return [step.out_shape for step in self._whole.steps]

    def call(self, piece: Piece) -> Call | None:
        """The call that a piece is."""
        return self._calls.get((piece.paths[0], piece.turn))

    def shapes(self) -> dict[tuple[str, int], Shape]:
        """The input's shape of each call."""
        return {key: call.shape for key, call in self._calls.items()}

    def taken(self, piece: Piece) -> Shape:
        """The shape of what a piece that is there takes."""
        call = self.call(piece)
        assert call is not None
        return call.shape

    def looks(self, piece: Piece) -> list[Shape] | None:
        """The shapes of all that a piece takes and holds; None where it is not there."""
        try:
            module = self.model.get_submodule(piece.paths[0])
        except AttributeError:
            return None
        if piece.kind == "held":
            return [tuple(t.shape) for t in module.state_dict().values()]
        call = self.call(piece)
        if call is None:
            return None
        taken = [t for t in tree_leaves((call.args, call.kwargs)) if isinstance(t, Tensor)]
        shapes = [tuple(t.shape) for t in taken]
        if piece.kind == "call":
            shapes += [tuple(t.shape) for t in module.state_dict().values()]
        return shapes


def _by_turn(run: Pass) -> dict[tuple[str, int], Call]:
    """The calls by their module's path and which of its calls it is."""
    found: dict[tuple[str, int], Call] = {}
    turns: Counter[str] = Counter()
    for call in run.calls:
        found[call.path, turns[call.path]] = call
        turns[call.path] += 1
    return found


def batch_dims(model: nn.Module, example: Tensor, pieces: Iterable[Piece]) -> dict[str, int]:
    """The dim that grows with the batch in what a piece takes, where that is not the first.

    Nothing where the model runs on no other batch than the example's.
    """
    folded = [p for p in pieces if p.shapes and p.shapes[0][:1] not in ((), (1,))]
    if not folded:
        return {}
    one, two = Run(model, example), Run(model, torch.cat([example, example]))
    try:
        grown = [(p.name, one.call(p), two.call(p)) for p in folded]
    except EspalierError:
        return {}
    found = {}
    for name, before, after in grown:
        if before is not None and after is not None:
            sizes = zip(main_tensor(before).shape, main_tensor(after).shape, strict=False)
            found[name] = next((i for i, (a, b) in enumerate(sizes) if b == 2 * a), 0)
    return {name: dim for name, dim in found.items() if dim}
