"""A plain network written down wire by wire: a torch.fx graph of torch's layers, nothing traced."""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
from torch import fx, nn

Wire = fx.Node


class Wired:
    """Layers and the wires between them, for networks that are no chain.

    `call` puts a layer on a wire and gives the wire behind it; `network` ends it. What comes out is
    a `GraphModule` whose layers have the names given.
    """

    def __init__(self) -> None:
        self._root = nn.Module()
        self._graph = fx.Graph()
        self.input: Wire = self._graph.placeholder("x")

    def call(self, name: str, layer: nn.Module, wire: Wire) -> Wire:
        """Runs `layer` on a wire; `name` may have dots."""
        *places, last = name.split(".")
        holder = self._root
        for place in places:
            if place not in holder._modules:
                holder.add_module(place, nn.Module())
            holder = holder.get_submodule(place)
        holder.add_module(last, layer)
        return self._graph.call_module(name, (wire,))

    def chain(self, name: str, layers: Iterable[tuple[str, nn.Module]], wire: Wire) -> Wire:
        """Runs named layers one after the other."""
        for last, layer in layers:
            wire = self.call(f"{name}.{last}", layer, wire)
        return wire

    def add(self, wires: Iterable[Wire]) -> Wire:
        """The sum of one or more wires, in their order."""
        first, *rest = wires
        for wire in rest:
            first = self._graph.call_function(operator.add, (first, wire))
        return first

    def nothing(self, wire: Wire) -> Wire:
        """Zeros of the wire's shape."""
        return self._graph.call_function(torch.zeros_like, (wire,))

    def network(self, output: Wire, name: str) -> fx.GraphModule:
        """The network from the input to `output`; layers that nothing reads are run all the same."""
        self._graph.output(output)
        return fx.GraphModule(self._root, self._graph, name)
