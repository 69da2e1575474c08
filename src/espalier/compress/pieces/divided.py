"""How a model divides into pieces: leaf layers with what follows them, calls, and held weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from espalier.compress.calls import Call, Pass, Shape, Value
from espalier.costs.layers import kind_of

_FOLLOWS = {"norm", "activation", "pool"}
_IDLE = (nn.Identity, nn.Flatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)

Layers = Mapping[str, tuple[str, ...]]


@dataclass
class Piece:
    """`chain`: leaf layers one after the other; `call`: one module with what it was called with;
    `held`: weights that belong to no layer's call. `turn`: which of its module's calls it is;
    `calls`: their places in the pass."""

    kind: str
    paths: list[str]
    turn: int = 0
    shapes: list[Shape] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)
    decisions: set[str] = field(default_factory=set)

    @property
    def name(self) -> str:
        """The path of its first module, with a number from its second call on."""
        return (self.paths[0] or "network") + (f"@{self.turn + 1}" if self.turn else "")


class Division:
    """The pieces of a model, from one pass of it; every weight is in exactly one."""

    def __init__(self, model: nn.Module, run: Pass, layers: Sequence[Layers]) -> None:
        self._model, self._run, self._layers = model, run, layers
        self._turns: Counter[str] = Counter()
        self._last: Value | None = None
        self.pieces: list[Piece] = []
        wholes = self._wholes()
        for i, call in enumerate(run.calls):
            if i in wholes:
                self._add("call", i)
            elif not any(run.within(i, j) for j in wholes) and _leaf(call.module):
                self._leaf(i)
        self._hold()

    def _wholes(self) -> set[int]:
        """The outermost calls that multiply outside of leaf layers."""
        found = {
            step.call
            for step in self._run.steps
            if step.macs and not _leaf(self._run.calls[step.call].module)
        }
        return {i for i in found if not any(j != i and self._run.within(i, j) for j in found)}

    def _leaf(self, index: int) -> None:
        call = self._run.calls[index]
        joins = self.pieces and self._last is not None and call.taken == self._last
        if not call.single:
            self._add("call", index)
        elif joins and self._follows(call):
            self.pieces[-1].paths.append(call.path)
            self.pieces[-1].shapes.append(call.shape)
            self.pieces[-1].calls.append(index)
            self._turns[call.path] += 1
            self._last = call.made
        elif not isinstance(call.module, _IDLE):
            self._add("chain", index)
        else:
            self._turns[call.path] += 1

    def _follows(self, call: Call) -> bool:
        """Runtimes fuse it with what comes before, and it runs whenever that does."""
        fuses = kind_of(call.module) in _FOLLOWS or isinstance(call.module, _IDLE)
        again = self._turns[call.path] > 0 and any(True for _ in call.module.parameters())
        return (
            fuses and not again and self._depth(call.path) == self._depth(self.pieces[-1].paths[0])
        )

    def _depth(self, path: str) -> set[str]:
        names = [n for layers in self._layers for n in layers.get(path, ())]
        return {n for n in names if n.startswith("depth:")}

    def _add(self, kind: str, index: int) -> None:
        call = self._run.calls[index]
        self.pieces.append(Piece(kind, [call.path], self._turns[call.path], [call.shape], [index]))
        self._turns[call.path] += 1
        self._last = call.made if kind == "chain" else None

    def _hold(self) -> None:
        """Weights outside of all pieces: of no layer, or of one that is never called."""
        calls = [p.paths[0] for p in self.pieces if p.kind == "call"]
        covered = {path for p in self.pieces for path in p.paths}
        for path, module in self._model.named_modules():
            inside = any(not c or path == c or path.startswith(c + ".") for c in calls)
            own = [*module._parameters.values(), *module._buffers.values()]
            if path not in covered and not inside and any(t is not None for t in own):
                self.pieces.append(Piece("held", [path]))


def _leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def told(layer: nn.Module, shape: Shape) -> Shape | None:
    """The input's shape of a layer that once took `shape`, by its own settings; None where they
    say nothing of it."""
    if isinstance(layer, nn.Linear):
        return (*shape[:-1], layer.in_features)
    if isinstance(layer, nn.modules.conv._ConvNd):
        return _channels(shape, layer.in_channels)
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        return _channels(shape, layer.num_features)
    if isinstance(layer, nn.GroupNorm):
        return _channels(shape, layer.num_channels)
    if isinstance(layer, nn.LayerNorm):
        return (*shape[: -len(layer.normalized_shape)], *layer.normalized_shape)
    return shape if isinstance(layer, nn.Embedding) else None


def _channels(shape: Shape, channels: int) -> Shape:
    return (shape[0], channels, *shape[2:])
