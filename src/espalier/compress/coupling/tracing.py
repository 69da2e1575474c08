"""A module's own forward as a graph of torch's that computes and trains as the forward does.

The graph is straight: what hangs on the mode in which the module is must stand in it as a value. So
the forward is traced in both modes, and where the two differ in numbers, as in the probability of a
dropout, the graph reads the mode. A forward that does other things while it trains is traced as it
evaluates.

What a graph reads of its module (the mode, and buffers) passes through an `nn.Identity`. To unpickle
a graph, torch traces its code again: what no module has given would be a constant from then on.
"""

from __future__ import annotations

import copy
import inspect
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn


def traced(module: nn.Module) -> fx.GraphModule:
    """A module's own forward as a graph, its children and their names as they were.

    Children are called, not looked into: what is replaced in them later is what runs. Optional
    arguments that are None by default stay None. Raises what torch.fx raises where it can't trace.
    """
    root = copy.copy(module)  # what tracing puts on a module is left on this
    root._modules = dict(module._modules)
    try:
        made = _both(root, buffers=True)
    except Exception:  # code that makes numbers of buffers: they are constants then
        made = _both(root, buffers=False)
    for node in made.nodes:
        node.meta.clear()
        node.type = None
    made._tracer_cls = None  # torch's own reads it from a file: none of ours is needed there
    return fx.GraphModule(root, made, type(module).__name__).train(module.training)


def _both(root: nn.Module, buffers: bool) -> fx.Graph:
    """The graph of the forward as it evaluates, with the numbers of training where it trains."""
    through = _Through(root)
    graph = _graph(root, False, buffers)
    with suppress(Exception):  # it can't be traced while it trains, or does other things then
        _merge(graph, _graph(root, True, buffers), through)
    if buffers:
        through.buffers(graph)
    return graph


def _graph(root: nn.Module, training: bool, buffers: bool) -> fx.Graph:
    fixed = {
        name: None
        for name, p in inspect.signature(root.forward).parameters.items()
        if p.default is None
    }
    tracer = _OwnForward()
    tracer.proxy_buffer_attributes = buffers
    with _lengths_followed(root), _mode(root, training), torch.random.fork_rng(devices=[]):
        return tracer.trace(root, concrete_args=fixed or None)


class _OwnForward(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


@contextmanager
def _mode(root: nn.Module, training: bool) -> Iterator[None]:
    before = [(module, module.training) for module in root.modules()]
    try:
        for module, _ in before:
            module.training = training
        yield
    finally:
        for module, mode in before:
            module.training = mode


def _length(x: Any) -> Any:
    return x.size(0) if isinstance(x, fx.Proxy) else len(x)


@contextmanager
def _lengths_followed(module: nn.Module) -> Iterator[None]:
    """Inside, `len(x)` in the module's forward is a size of `x`, which torch.fx alone refuses."""
    names: dict[str, Any] = getattr(type(module).forward, "__globals__", {})
    before = {name: names[name] for name in ("len",) if name in names}
    names["len"] = _length
    try:
        yield
    finally:
        del names["len"]
        names.update(before)


# --- what is read of the module ------------------------------------------------------------------


class _Through:
    """The `nn.Identity` that a graph passes things through; the module gets it when it is used."""

    def __init__(self, root: nn.Module) -> None:
        self._root, self._name = root, "through"
        while hasattr(root, self._name):
            self._name += "_"

    def _passed(self, graph: fx.Graph, thing: fx.Node) -> fx.Node:
        self._root._modules.setdefault(self._name, nn.Identity())
        return graph.create_node("call_module", self._name, (thing,))

    def buffers(self, graph: fx.Graph) -> None:
        """Buffers of the module are read through it."""
        names = {name for name, _ in self._root.named_buffers()}
        for node in list(graph.nodes):
            if node.op == "get_attr" and node.target in names:
                with graph.inserting_after(node):
                    passed = self._passed(graph, node)
                node.replace_all_uses_with(passed, lambda user, own=passed: user is not own)

    def alike(self, one: fx.Node, two: fx.Node) -> bool:
        """Whether two nodes do the same; constants have names of their own in each graph."""
        if one.target == two.target or one.op != "get_attr":
            return one.target == two.target
        a, b = (operator.attrgetter(str(node.target))(self._root) for node in (one, two))
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)

    def training(self, graph: fx.Graph) -> fx.Node:
        """Whether the module trains: its own mode is the module's."""
        first = next(node for node in graph.nodes if node.op != "placeholder")
        with graph.inserting_before(first):
            self._root._modules.setdefault(self._name, nn.Identity())
            one = self._passed(graph, graph.create_node("get_attr", self._name))
            return graph.call_function(getattr, (one, "training"))


# --- numbers that hang on the mode -----------------------------------------------------------------


class _Apart(Exception):
    """Two graphs differ in more than numbers."""


def _merge(graph: fx.Graph, training: fx.Graph, through: _Through) -> None:
    """Where the same graph has other numbers while it trains, it reads the mode. Raises `_Apart`
    before anything is changed where more is other."""
    pairs = list(zip(graph.nodes, training.nodes, strict=True))
    twin = {b: a for a, b in pairs}
    if not all(a.op == b.op and through.alike(a, b) for a, b in pairs):
        raise _Apart
    differs = []
    for a, b in pairs:
        found: list[Any] = []
        for one, two in ((a.args, b.args), (a.kwargs, b.kwargs)):
            _joined(one, two, twin, lambda *numbers, own=found: own.append(numbers))
        differs += [(a, b)] if found else []
    if not differs:
        return
    mode = through.training(graph)
    for a, b in differs:
        with graph.inserting_before(a):
            pick = partial(_picked, graph, mode)
            a.args = _joined(a.args, b.args, twin, pick)
            a.kwargs = _joined(a.kwargs, b.kwargs, twin, pick)


def _joined(one: Any, two: Any, twin: Mapping[fx.Node, fx.Node], pick: Callable[..., Any]) -> Any:
    """Arguments as they are in both modes, with `pick(one, two)` for numbers that differ."""
    if isinstance(one, fx.Node) and twin.get(two) is one:
        return one
    if isinstance(one, (tuple, list)) and isinstance(two, (tuple, list)):
        made = [_joined(a, b, twin, pick) for a, b in zip(one, two, strict=True)]
        return tuple(made) if isinstance(one, tuple) else made
    if isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
        return {key: _joined(value, two[key], twin, pick) for key, value in one.items()}
    if isinstance(one, slice) and isinstance(two, slice):
        ends = ((one.start, two.start), (one.stop, two.stop), (one.step, two.step))
        return slice(*(_joined(a, b, twin, pick) for a, b in ends))
    if type(one) is type(two) and one == two:
        return one
    if all(isinstance(x, (bool, int, float)) and math.isfinite(x) for x in (one, two)):
        return pick(one, two)
    raise _Apart


def _picked(graph: fx.Graph, mode: fx.Node, evaluated: float, trained: float) -> fx.Node:
    """The number that stands for a mode, without a branch: True counts 1."""
    if trained is True and evaluated is False:
        return mode
    rest = graph.call_function(operator.eq, (mode, False)) if evaluated else None
    if evaluated is True and trained is False:
        return rest
    parts = [(mode, trained), (rest, evaluated)]
    made = [graph.call_function(operator.mul, (on, value)) for on, value in parts if value]
    return made[0] if len(made) == 1 else graph.call_function(operator.add, tuple(made))
