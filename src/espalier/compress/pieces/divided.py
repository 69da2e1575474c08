"""How a model divides into pieces: leaf layers with what follows them, calls, and held weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from espalier.compress.calls import Call, Pass, Shape
from espalier.costs.layers import kind_of

_FOLLOWS = {"norm", "activation", "pool"}
_IDLE = (nn.Identity, nn.Flatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)

Layers = Mapping[str, tuple[str, ...]]


@dataclass
class Piece:
    """`chain`: leaf layers one after the other; `call`: one module with what it was called with;
    `held`: weights that belong to no layer's call. `turn`: which of its module's calls it is;
    `calls`: their places in the pass; `moving`: the decisions that change its input's shape beside
    what its first layer tells of it."""

    kind: str
    paths: list[str]
    turn: int = 0
    shapes: list[Shape] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)
    decisions: set[str] = field(default_factory=set)
    moving: set[str] = field(default_factory=set)

    @property
    def name(self) -> str:
        """The path of its first module, with a number from its second call on."""
        return (self.paths[0] or "network") + (f"@{self.turn + 1}" if self.turn else "")


class Division:
    """The pieces of a model, from one pass of it; every weight is in exactly one."""

    def __init__(self, model: nn.Module, run: Pass, layers: Sequence[Layers]) -> None:
        self._model, self._run, self._layers = model, run, layers
        self._turns: Counter[str] = Counter()
        self._last: Call | None = None
        self.pieces: list[Piece] = []
        wholes = self._wholes()
        for i in range(len(run.calls)):
            if i in wholes:
                self._add("call", i)
            elif not any(run.within(i, j) for j in wholes) and self._is_layer(i):
                self._leaf(i)
        self._hold()

    def _is_layer(self, index: int) -> bool:
        """A leaf, or the outermost of what holds weights of its own and none below: a norm with
        its activation is one layer, as runtimes fuse both."""
        call = self._run.calls[index]
        inside = call.parent >= 0 and _weighs_alone(self._run.calls[call.parent].module)
        return not inside and (_leaf(call.module) or _weighs_alone(call.module))

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
        joins = self.pieces and self._last is not None and _handed_on(self._last, call)
        if not call.single:
            self._add("call", index)
        elif joins and self._follows(call):
            self.pieces[-1].paths.append(call.path)
            self.pieces[-1].shapes.append(call.shape)
            self.pieces[-1].calls.append(index)
            self._turns[call.path] += 1
            self._last = call
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
        self._last = call if kind == "chain" else None

    def _hold(self) -> None:
        """Weights outside of all pieces: of no layer, or of one that is never called."""
        calls = [p.paths[0] for p in self.pieces if p.kind == "call"]
        covered = {path for p in self.pieces for path in p.paths}
        for path, module in self._model.named_modules():
            inside = any(not c or path == c or path.startswith(c + ".") for c in calls)
            own = [*module._parameters.values(), *module._buffers.values()]
            if path not in covered and not inside and any(t is not None for t in own):
                self.pieces.append(Piece("held", [path]))


def _handed_on(before: Call, after: Call) -> bool:
    """Whether a layer's result goes into the next as it is: not turned, nor folded."""
    if before.made is None or before.made != after.taken or not after.args:
        return False
    made, taken = before.output, after.args[0]
    if not isinstance(made, Tensor) or not isinstance(taken, Tensor):
        return False
    placed = (made.shape, made.stride(), made.storage_offset())
    return placed == (taken.shape, taken.stride(), taken.storage_offset())


def _leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def _weighs_alone(module: nn.Module) -> bool:
    """Whether a module's own weights are all that it and its children hold."""
    own = {id(t) for t in (*module._parameters.values(), *module._buffers.values())}
    below = (*module.parameters(), *module.buffers())
    return bool(below) and all(id(t) in own for t in below)


def told(layer: nn.Module, shape: Shape, places: tuple[int, ...] | None) -> Shape | None:
    """The input's shape of a layer that once took `shape`, by its own sizes at these places; None
    where it tells none."""
    sizes = _sizes(layer)
    if sizes is None or places is None:
        return None
    found = list(shape)
    for place, size in zip(places, sizes[1], strict=True):
        found[place] = size
    return tuple(found)


def others(shape: Shape, places: tuple[int, ...]) -> Shape:
    """An input's shape without a layer's own sizes at these places."""
    own = {place % len(shape) for place in places}
    return tuple(size for i, size in enumerate(shape) if i not in own)


def joined(own: Shape, other: Shape, places: tuple[int, ...]) -> Shape:
    """The sizes of `own` at these places, those of `other` elsewhere."""
    found = list(other)
    for place in places:
        found[place] = own[place]
    return tuple(found)


def places_of(layer: nn.Module, shape: Shape) -> tuple[int, ...] | None:
    """Where in its input's shape a layer's own sizes stand; None where that is not known.

    torch's own layers say it; another `forward` may turn its input first (a norm over the channels
    of images): there it is known where the size stands at one place only.
    """
    found = _sizes(layer)
    if found is None:
        return None
    first, sizes = found
    usual = tuple(range(first, first + len(sizes)))
    if type(layer).forward.__module__.startswith("torch."):
        return usual
    if len(sizes) != 1:
        return None
    fitting = [i for i, size in enumerate(shape) if i > 0 and size == sizes[0]]
    return (fitting[0],) if len(fitting) == 1 else None


def _sizes(layer: nn.Module) -> tuple[int, tuple[int, ...]] | None:
    """The sizes that a layer knows of its input, and the place of the first in torch's layers."""
    if isinstance(layer, nn.Linear):
        return -1, (layer.in_features,)
    if isinstance(layer, nn.modules.conv._ConvNd):
        return 1, (layer.in_channels,)
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        return 1, (layer.num_features,)
    if isinstance(layer, nn.GroupNorm):
        return 1, (layer.num_channels,)
    if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
        return -len(layer.normalized_shape), tuple(layer.normalized_shape)
    return (0, ()) if isinstance(layer, nn.Embedding) else None
