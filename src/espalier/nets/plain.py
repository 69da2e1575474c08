"""From a tree with elastic modules to a plain network: copy, then trace.

The copy has torch layers where the elastic ones stood. Tracing with torch.fx then leaves a
GraphModule of torch layers only: the classes of the user's blocks and of this package are gone,
the names of the layers stay.
"""

from __future__ import annotations

import copy
from types import TracebackType
from typing import Any

from torch import fx, nn

from espalier.errors import ExportError
from espalier.nets.elastic.core import Elastic, initialise
from espalier.nets.elastic.dims import Choices


class Copier:
    """Copies modules, with plain layers in the place of elastic ones.

    With `fresh` the copy has new random weights from torch's global generator, else the same.
    """

    def __init__(self, choices: Choices, fresh: bool = False) -> None:
        self.choices, self.fresh = choices, fresh
        self._memo: dict[int, Any] = {}
        self._done: set[int] = set()

    def __call__(self, module: nn.Module) -> nn.Module:
        """A copy of `module`; what is inside and is not run under `choices` is left out."""
        self._stand_in(module)
        twin: nn.Module = copy.deepcopy(module, self._memo)
        if self.fresh:
            self._refresh(twin)
        return twin

    def _stand_in(self, module: nn.Module) -> None:
        """Enters the plain forms into deepcopy's memo: then every reference finds them."""
        if id(module) in self._memo:
            return
        if isinstance(module, Elastic):
            twin = module.plain(self)
            self._memo[id(module)] = twin
            self._done.update(id(inner) for inner in twin.modules())
            return
        for child in module.children():
            self._stand_in(child)

    def _refresh(self, twin: nn.Module) -> None:
        for path, module in twin.named_modules():
            if id(module) in self._done:
                continue
            self._done.add(id(module))
            if hasattr(module, "reset_parameters") or hasattr(module, "_reset_parameters"):
                initialise(module)
            elif next(module.parameters(recurse=False), None) is not None:
                name = type(module).__name__
                raise ExportError(
                    f"can't give {path or name} fresh weights: {name} holds a parameter of its own."
                    f" Give {name} a reset_parameters() method, or use elastic.Parameter"
                )


def plain(module: nn.Module, choices: Choices, fresh: bool = False) -> nn.Module:
    """A plain network for `choices`, made of torch's classes only.

    A module that needs no tracing to be plain comes back as the torch module it is.
    Errors: `ExportError` where torch.fx can't trace a forward, with what to change.
    """
    training = module.training
    twin = Copier(choices, fresh)(module)
    if all(type(inner).__module__.startswith("torch.") for inner in twin.modules()):
        return twin.train(training)
    return traced(twin, type(module).__name__).train(training)


def traced(module: nn.Module, name: str) -> fx.GraphModule:
    """Traces a forward into a GraphModule, without the modules that do nothing."""
    tracer = fx.Tracer()
    try:
        graph = tracer.trace(module)
    except Exception as error:
        raise ExportError(_why(module, error)) from error
    _refuse_frozen_mode(graph, name)
    _drop_identities(module, graph)
    _forget_origin(graph)
    return fx.GraphModule(module, graph, name)


def _drop_identities(module: nn.Module, graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.op == "call_module" and isinstance(
            module.get_submodule(str(node.target)), nn.Identity
        ):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _forget_origin(graph: fx.Graph) -> None:
    """Tracing notes classes, annotations and files on its way; they must not travel along."""
    for node in graph.nodes:
        node.meta.clear()
        node.type = None  # an annotation kept as a string also breaks pickling
    if hasattr(graph, "_co_fields"):
        graph._co_fields = {}


def _refuse_frozen_mode(graph: fx.Graph, name: str) -> None:
    for node in graph.nodes:
        if node.op == "call_function" and node.kwargs.get("training") is True:
            function = getattr(node.target, "__name__", str(node.target))
            raise ExportError(
                f"{name}: {function}(training=self.training) would stay in training mode for ever"
                f" in the plain network: use the module, such as nn.Dropout, in its place"
            )


def _why(module: nn.Module, error: Exception) -> str:
    """Which forward could not be traced, and what to change in it."""
    where = type(module).__name__ + ".forward"
    line = ""
    for frame, number in _frames(error.__traceback__):
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and not type(owner).__module__.startswith("torch."):
            where = f"{type(owner).__name__}.{frame.f_code.co_name}"
            line = f", line {number}"
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"torch.fx can't trace {where}{line} ({reason}): no Python if, loop or number may hang on a"
        " tensor or its shape; decisions go into Repeat, Skippable and OneOf"
    )


def _frames(trace: TracebackType | None) -> list[tuple[Any, int]]:
    out = []
    while trace is not None:
        out.append((trace.tb_frame, trace.tb_lineno))
        trace = trace.tb_next
    return out
