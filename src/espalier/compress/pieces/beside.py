"""What stays alive while a piece runs: shortcuts, and what waits to be concatenated."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from espalier.compress.calls import Pass, Shape, Value
from espalier.compress.pieces.divided import Piece
from espalier.space import Decision, Option

_FLOAT = 4  # bytes


class Beside:
    """Bytes alive beside each piece, for any widths.

    A value's size is linear in the widths that decide it: `probe` gives the shapes of what
    operations make with one decision changed. A piece's own input is not beside it. A value whose
    block is left out still counts.
    """

    def __init__(
        self,
        run: Pass,
        pieces: Sequence[Piece],
        widths: Sequence[Decision],
        probe: Callable[[Decision], Sequence[Shape]],
    ) -> None:
        self._run = run
        self._original = {d.name: float(d.options[-1]) for d in widths}
        self._alive = {piece.name: self._found(piece) for piece in pieces if piece.calls}
        steps = {step for found in self._alive.values() for step in found}
        self._sizes = {i: float(math.prod(run.steps[i].out_shape)) for i in steps}
        self._slopes: dict[int, dict[str, float]] = {i: {} for i in steps}
        for decision in widths if steps else ():
            other = probe(decision)
            if len(other) != len(run.steps):  # not the same program: nothing to compare
                self._alive = {}
                return
            change = float(decision.options[-1]) - float(decision.options[0])
            for i in steps:
                lost = self._sizes[i] - math.prod(other[i])
                if lost and change:
                    self._slopes[i][decision.name] = lost / change

    def decisions(self, piece: Piece) -> set[str]:
        """The widths of what is alive beside a piece."""
        return {name for i in self._alive.get(piece.name, ()) for name in self._slopes[i]}

    def bytes(self, piece: Piece, choices: Mapping[str, Option]) -> int:
        """Bytes alive beside a piece under these choices, the others being the original's."""
        total = 0.0
        for i in self._alive.get(piece.name, ()):
            total += self._sizes[i]
            for name, slope in self._slopes[i].items():
                now = float(choices.get(name, self._original[name]))
                total -= slope * (self._original[name] - now)
        return round(_FLOAT * total)

    def _found(self, piece: Piece) -> list[int]:
        """The steps whose results are made before a piece and read after it."""
        own = [i for i, step in enumerate(self._run.steps) if self._inside(step.call, piece)]
        if not own:
            return []
        taken = self._run.calls[piece.calls[0]].taken
        found = []
        for i, value in self._made_before(own[0]):
            later = any(value in step.reads for step in self._run.steps[own[-1] + 1 :])
            if later and value != taken:
                found.append(i)
        return found

    def _made_before(self, first: int) -> Iterator[tuple[int, Value]]:
        for i, step in enumerate(self._run.steps[:first]):
            if step.made is not None:
                yield i, step.made

    def _inside(self, call: int, piece: Piece) -> bool:
        return any(self._run.within(call, own) for own in piece.calls)
