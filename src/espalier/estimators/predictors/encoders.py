"""Encoders of graphs, many members side by side: GATES on edges and on nodes, a GCN, a flat one.

Every parameter has a leading axis of members: an ensemble is trained with the calls of one network.
An encoder maps a batch of `n` graphs to embeddings `(members, n, width)`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Affine(nn.Module):
    """A linear layer for each member: `(members, n, inputs)` to `(members, n, outputs)`."""

    def __init__(self, members: int, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        bound = math.sqrt(3 / inputs)  # unit variance in, unit variance out
        self.weight = nn.Parameter(torch.empty(members, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(members, 1, outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Each member's own product; `x` without a leading axis of members is shared."""
        return x @ self.weight if self.bias is None else x @ self.weight + self.bias


class Encoder(nn.Module, ABC):
    """Embeds graphs; `width` is the size of an embedding, `members` their number a graph."""

    def __init__(self, members: int, width: int, dropout: float) -> None:
        super().__init__()
        self.members, self.width, self.dropout = members, width, dropout

    @abstractmethod
    def forward(self, *graphs: Tensor) -> Tensor:
        """Embeddings `(members, n, width)`."""

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(F.relu(x), self.dropout, self.training)


class GatesOnEdges(Encoder):
    """GATES for operators on edges (Ning et al., 2020): operators gate what passes over them.

    A layer maps the nodes' information H to, at node i, the sum over edges j -> i of
    sigmoid(e_o W_a) * (H_j W + b), e_o being the embedding of the edge's operator, plus the node's
    own H_i W + b. At first the input node alone holds anything; the embedding is the output
    node's. Input: one-hot operators `(n, edges, k)`; an edge of zeros passes nothing.
    """

    def __init__(
        self,
        edges: tuple[tuple[int, int], ...],
        operators: int,
        members: int,
        width: int,
        layers: int,
        dropout: float,
    ) -> None:
        super().__init__(members, width, dropout)
        nodes = max(b for _, b in edges) + 1
        self.start = nn.Parameter(torch.randn(members, 1, 1, width))
        self.operators = nn.Parameter(torch.randn(members, operators, width))
        self.pass_on = nn.ModuleList(Affine(members, width, width) for _ in range(layers))
        self.attend = nn.ModuleList(
            Affine(members, width, width, bias=False) for _ in range(layers)
        )
        into = torch.zeros(nodes, len(edges))
        for e, (_, b) in enumerate(edges):
            into[b, e] = 1.0
        first = torch.zeros(nodes, 1)
        first[0] = 1.0
        self.register_buffer("into", into, persistent=False)
        self.register_buffer("first", first, persistent=False)
        self.register_buffer("source", torch.tensor([a for a, _ in edges]), persistent=False)

    def forward(self, *graphs: Tensor) -> Tensor:
        """Embeddings `(members, n, width)` of one-hot operators `(n, edges, k)`."""
        (chosen,) = graphs
        n, edges, k = chosen.shape
        into, first = self.get_buffer("into"), self.get_buffer("first")
        source = self.get_buffer("source")
        members, nodes, width = self.members, len(into), self.width
        h = (self.start * first).expand(members, n, nodes, width)
        for i, (pass_on, attend) in enumerate(zip(self.pass_on, self.attend, strict=True)):
            gates = chosen.reshape(n * edges, k) @ torch.sigmoid(attend(self.operators))
            z = pass_on(h.reshape(members, n * nodes, width)).view(members, n, nodes, width)
            h = into @ (gates.view(members, n, edges, width) * z[:, :, source]) + z
            if i < len(self.pass_on) - 1:
                h = self._drop(h)
        return h[:, :, -1]


class FlowOnEdges(Encoder):
    """GATES node after node, once: a node is complete before anything leaves it.

    Node i becomes the sum over edges j -> i of sigmoid(e_o W_a) * relu(H_j W + b), and of H_j as it
    is where the operator is `skip`. So cells that compute the same function, by skips or by the
    order of their nodes, have the same embedding, which `GatesOnEdges` has to learn. Input as
    there; ours, after the asynchronous message passing of D-VAE (Zhang et al., 2019).
    """

    def __init__(
        self,
        edges: tuple[tuple[int, int], ...],
        operators: int,
        skip: int | None,
        members: int,
        width: int,
        dropout: float,
    ) -> None:
        super().__init__(members, width, dropout)
        self.edges, self.skip = edges, skip
        self.start = nn.Parameter(torch.randn(members, 1, width))
        self.operators = nn.Parameter(torch.randn(members, operators, width))
        self.pass_on = Affine(members, width, width)
        self.attend = Affine(members, width, width, bias=False)

    def forward(self, *graphs: Tensor) -> Tensor:
        """Embeddings `(members, n, width)` of one-hot operators `(n, edges, k)`."""
        (chosen,) = graphs
        n, edges, k = chosen.shape
        changed = chosen
        if self.skip is not None:
            changed = chosen.clone()
            changed[:, :, self.skip] = 0
        gates = changed.reshape(n * edges, k) @ torch.sigmoid(self.attend(self.operators))
        gates = gates.view(self.members, n, edges, self.width)
        held = {0: self.start.expand(self.members, n, self.width)}
        passed: dict[int, Tensor] = {}
        for node in range(1, max(b for _, b in self.edges) + 1):
            parts = []
            for e, (a, b) in enumerate(self.edges):
                if b != node:
                    continue
                if a not in passed:
                    passed[a] = self._drop(self.pass_on(held[a]))
                parts.append(gates[:, :, e] * passed[a])
                if self.skip is not None:
                    parts.append(chosen[:, e, self.skip].unsqueeze(1) * held[a])
            held[node] = torch.stack(parts).sum(0)
        return held[node]


class GatesOnNodes(Encoder):
    """GATES for operators on nodes: sigmoid(e_o W_a) * (A^T (H W + b)) + H W + b at each node.

    At first the nodes that nothing feeds hold something; the embedding is the mean over the nodes
    that feed nothing. Input: one-hot operators `(n, v, k)`, padding being zeros, and the adjacency
    `(n, v, v)` whose `[a, b]` says that a feeds b.
    """

    def __init__(
        self, operators: int, members: int, width: int, layers: int, dropout: float
    ) -> None:
        super().__init__(members, width, dropout)
        self.start = nn.Parameter(torch.randn(members, 1, 1, width))
        self.operators = nn.Parameter(torch.randn(members, operators, width))
        self.pass_on = nn.ModuleList(Affine(members, width, width) for _ in range(layers))
        self.attend = nn.ModuleList(
            Affine(members, width, width, bias=False) for _ in range(layers)
        )

    def forward(self, *graphs: Tensor) -> Tensor:
        """Embeddings `(members, n, width)`."""
        chosen, adjacency = graphs
        n, v, k = chosen.shape
        real = chosen.sum(2, keepdim=True)
        first = real * (adjacency.sum(1) == 0).unsqueeze(2)
        last = real * (adjacency.sum(2) == 0).unsqueeze(2)
        feeds = adjacency.transpose(1, 2)
        h = self.start * first
        for i, (pass_on, attend) in enumerate(zip(self.pass_on, self.attend, strict=True)):
            gates = chosen.reshape(n * v, k) @ torch.sigmoid(attend(self.operators))
            z = pass_on(h.reshape(len(h), n * v, -1)).view(len(h), n, v, -1)
            h = gates.view(self.members, n, v, -1) * (feeds @ z) + real * z
            if i < len(self.pass_on) - 1:
                h = self._drop(h)
        return (h * last).sum(2) / last.sum(1).clamp(min=1)


class GCN(Encoder):
    """Graph convolutions over operators on nodes (Kipf & Welling, 2017), mean over the nodes.

    A layer is relu(D^-1 (A^T + I) H W + b), D the row sums; nodes start from their operator's
    embedding. Input as for `GatesOnNodes`.
    """

    def __init__(
        self, operators: int, members: int, width: int, layers: int, dropout: float
    ) -> None:
        super().__init__(members, width, dropout)
        self.operators = nn.Parameter(torch.randn(members, operators, width))
        self.mix = nn.ModuleList(Affine(members, width, width) for _ in range(layers))

    def forward(self, *graphs: Tensor) -> Tensor:
        """Embeddings `(members, n, width)`."""
        chosen, adjacency = graphs
        n, v, k = chosen.shape
        real = chosen.sum(2, keepdim=True)
        looped = adjacency.transpose(1, 2) + torch.eye(v, device=chosen.device)
        mean = looped / looped.sum(2, keepdim=True)
        h = (chosen.reshape(n * v, k) @ self.operators).view(self.members, n, v, -1)
        for i, mix in enumerate(self.mix):
            h = mix((mean @ h).reshape(self.members, n * v, -1)).view(self.members, n, v, -1)
            if i < len(self.mix) - 1:
                h = self._drop(h)
        return (h * real).sum(2) / real.sum(1)


class Flat(Encoder):
    """All one-hot operators (and the adjacency, where there is one) side by side, one layer."""

    def __init__(self, inputs: int, members: int, width: int, dropout: float) -> None:
        super().__init__(members, width, dropout)
        self.first = Affine(members, inputs, width)

    def forward(self, *graphs: Tensor) -> Tensor:
        """Embeddings `(members, n, width)`."""
        return self._drop(self.first(torch.cat([g.flatten(1) for g in graphs], 1)))
