"""Edge normalisation: the edges that meet in a node compete (PC-DARTS, Xu et al., 2020)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from espalier.errors import SpaceError
from espalier.solvers.relax.moment import Moment
from espalier.solvers.relax.relaxation import Logits, Relaxation
from espalier.solvers.relax.softmax import Softmax

if TYPE_CHECKING:
    from espalier.nets.elastic.mixing import Mixture

_NODE = "join:"  # before a node's name in the names of logits; decisions are not named so


class EdgeNormalised(Relaxation):
    """An inner relaxation's weights, each edge's times softmax over the edges of its node.

    The second set of logits has one vector for each node of `supernet.joins` with two or more edges.
    It steadies the choice of edges where operators see a part of the channels only, anew each time.
    """

    def __init__(self, inner: Relaxation | None = None) -> None:
        self.inner = inner if inner is not None else Softmax()
        self._edges: dict[str, tuple[str, ...]] = {}

    def start(
        self, supernet: Any, names: Sequence[str], generator: torch.Generator
    ) -> dict[str, nn.Parameter]:
        """The inner logits, then one vector a node. Errors: `SpaceError` without joins."""
        out = self.inner.start(supernet, names, generator)
        joins: Mapping[str, Sequence[str]] = supernet.joins
        self._edges = {}
        for node, edges in joins.items():
            kept = tuple(edge for edge in edges if edge in names)
            if len(kept) > 1:
                self._edges[_NODE + node] = kept
        if not self._edges:
            raise SpaceError(
                "EdgeNormalised needs a supernet with joins, nodes in which two or more edges meet;"
                " there are none: use the relaxation within it"
            )
        device = next(iter(out.values())).device
        for node, kept in self._edges.items():
            drawn = torch.randn(len(kept), generator=generator) * 1e-3
            out[node] = nn.Parameter(drawn.to(device))
        return out

    def weights(self, logits: Logits, moment: Moment) -> Mixture:
        """The inner mixture, times the strength of each edge."""
        out = dict(self.inner.weights(self._own(logits), moment))
        for name, strength in self.strengths(logits).items():
            found = out[name]
            if isinstance(found, Tensor):
                out[name] = found * strength
            else:
                out[name] = replace(found, weights=found.weights * strength)
        return out

    def probabilities(self, logits: Logits) -> dict[str, Tensor]:
        """Those of the inner relaxation."""
        return self.inner.probabilities(self._own(logits))

    def strengths(self, logits: Logits) -> dict[str, Tensor]:
        """Softmax over the edges of each node, a scalar an edge."""
        out: dict[str, Tensor] = {}
        for node, edges in self._edges.items():
            out.update(zip(edges, torch.softmax(logits[node], 0).unbind(), strict=True))
        return out

    def after_step(self, logits: Logits, before: Mapping[str, Tensor]) -> None:
        """The inner relaxation's."""
        self.inner.after_step(self._own(logits), before)

    def tensors(self) -> dict[str, Tensor]:
        """The inner relaxation's."""
        return self.inner.tensors()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """The inner relaxation's."""
        self.inner.load(tensors)

    def _own(self, logits: Logits) -> Logits:
        return {name: found for name, found in logits.items() if name not in self._edges}
