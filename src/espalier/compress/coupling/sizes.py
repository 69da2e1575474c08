"""Sizes written into traced graphs (`reshape(x, -1, 16, 4, 8)`) that must follow cut channels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, fx, nn

Place = tuple[int, ...]  # where in a node's arguments the size stands

SHAPED = ("view", "reshape", "_unsafe_view", "expand")
NORMED = ("layer_norm", "native_layer_norm", "rms_norm")
PARTED = ("split", "split_with_sizes")


@dataclass(frozen=True)
class Size:
    """One size in a graph: `path` of the graph module, node, place; `whole` is the size uncut.

    `rows`: how many places of the dim each unit of the group takes.
    """

    path: str
    node: str
    place: Place
    dim: int
    whole: int
    rows: Tensor


@dataclass(frozen=True)
class SizeRead:
    """A size met while a graph ran, with the labels along its dim."""

    path: str
    node: str
    place: Place
    dim: int
    labels: Tensor


class Watch(Protocol):
    """What is told of each node that ran."""

    def __call__(self, path: str, node: fx.Node, out: Any) -> None: ...


def sizes_of(node: fx.Node, out: Any) -> Iterator[tuple[Place, int, Tensor]]:
    """The sizes among a node's arguments: place, dim, and the tensor whose size it is."""
    name = node.target if isinstance(node.target, str) else _name(node.target)
    if node.op not in ("call_method", "call_function"):
        return
    if name in SHAPED and isinstance(out, Tensor):
        listed = len(node.args) == 2 and isinstance(node.args[1], (list, tuple))
        given: Any = node.args[1] if listed else node.args[1:]
        count = len(given)
        if count == out.dim():
            for dim in range(count):
                yield ((1, dim) if listed else (1 + dim,)), dim, out
    elif name in NORMED and len(node.args) > 1 and isinstance(node.args[1], (list, tuple)):
        normed = out if isinstance(out, Tensor) else out[0]
        for i in range(len(node.args[1])):
            yield (1, i), normed.dim() - len(node.args[1]) + i, normed
    elif name in PARTED and len(node.args) > 1 and out:
        along: Any = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
        if isinstance(along, int) and isinstance(node.args[1], (list, tuple)):
            for i, part in enumerate(out):
                yield (1, i), along % part.dim(), part
        elif isinstance(along, int):
            yield (1,), along % out[0].dim(), out[0]


def _name(target: Any) -> str:
    return str(getattr(target, "__name__", target)).split(".")[0]


def value_at(node: fx.Node, place: Place) -> Any:
    """The argument at a place."""
    found: Any = node.args
    for index in place:
        found = found[index]
    return found


def resize(graph: fx.GraphModule, wanted: Iterable[tuple[Size | SizeRead, int]]) -> None:
    """Write new sizes into a graph: those found from others' shapes become -1 where one may."""
    nodes = {node.name: node for node in graph.graph.nodes}
    for size, value in sorted(wanted, key=lambda pair: (pair[0].node, pair[0].dim)):
        node = nodes[size.node]
        old = value_at(node, size.place)
        if isinstance(old, int) and old < 0:
            continue
        shaped = _name(node.target) in SHAPED or node.target in SHAPED
        if isinstance(old, fx.Node) and shaped and not _inferred(node):
            value = -1  # whatever else is computed there, such as a batch, stays free
        elif isinstance(old, fx.Node) and size.dim == 0:
            continue
        _write(node, size.place, value)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _inferred(node: fx.Node) -> bool:
    given = node.args[1] if isinstance(node.args[1], (list, tuple)) else node.args[1:]
    return any(isinstance(n, int) and n < 0 for n in given)


def _write(node: fx.Node, place: Place, value: int) -> None:
    args = list(node.args)
    if len(place) == 2:
        inner = list(args[place[0]])  # type: ignore[arg-type]
        inner[place[1]] = value
        args[place[0]] = inner
    else:
        args[place[0]] = value
    node.args = tuple(args)


class _Reading(fx.Interpreter):
    """Runs a graph node by node and tells of each."""

    def __init__(self, module: fx.GraphModule, path: str, watch: Watch) -> None:
        super().__init__(module)
        self._path, self._watch = path, watch

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        self._watch(self._path, n, out)
        return out


@contextmanager
def graphs_watched(model: nn.Module, watch: Watch) -> Iterator[None]:
    """Inside, the graph modules of a model run node by node, and `watch` is told."""
    found = [(p, m) for p, m in model.named_modules() if isinstance(m, fx.GraphModule)]
    for path, module in found:
        module.__dict__["forward"] = _forward(module, path, watch)
    try:
        yield
    finally:
        for _, module in found:
            del module.__dict__["forward"]


def _forward(module: fx.GraphModule, path: str, watch: Watch) -> Any:
    order = [str(n.target) for n in module.graph.nodes if n.op == "placeholder"]

    def run(*args: Any, **kwargs: Any) -> Any:
        rest = [kwargs[name] for name in order[len(args) :] if name in kwargs]
        return _Reading(module, path, watch).run(*args, *rest)

    return run
