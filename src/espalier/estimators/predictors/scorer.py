"""An encoder with a small network on top: one score a graph and member."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.errors import EspalierError, unknown
from espalier.estimators.predictors.encoders import (
    GCN,
    Affine,
    Encoder,
    Flat,
    FlowOnEdges,
    GatesOnEdges,
    GatesOnNodes,
)
from espalier.estimators.predictors.inputs import Batch, Reader

ENCODERS = ("gates", "flow", "gcn", "flat")
_ROWS = 2048  # graphs scored at once


@dataclass(frozen=True)
class Shape:
    """Sizes of a scorer: `members` networks, embeddings of `width`, `layers` of the encoder,
    `hidden` units in each of the `depth - 1` hidden layers on top."""

    encoder: str = "gates"
    members: int = 4
    width: int = 48
    layers: int = 5
    hidden: int = 64
    depth: int = 3
    dropout: float = 0.05


class Scorer(nn.Module):
    """Scores `(members, n)` of a batch: an encoder, extra inputs beside it, a perceptron on top."""

    def __init__(self, encoder: Encoder, extras: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.encoder = encoder
        sizes = [encoder.width + extras] + [hidden] * (depth - 1) + [1]
        self.head = nn.ModuleList(Affine(encoder.members, a, b) for a, b in pairwise(sizes))

    def forward(self, batch: Batch) -> Tensor:
        """Scores `(members, n)`."""
        z: Tensor = self.encoder(*batch.graphs)
        if batch.extras is not None:
            z = torch.cat([z, batch.extras.expand(len(z), *batch.extras.shape)], 2)
        for i, layer in enumerate(self.head):
            if i:
                z = F.dropout(F.relu(z), self.encoder.dropout, self.training)
            z = layer(z)
        return z.squeeze(2)


def encoder(reader: Reader, shape: Shape, members: int | None = None) -> Encoder:
    """The encoder of a shape for what a reader reads. Errors: `EspalierError`, unknown name."""
    if shape.encoder not in ENCODERS:
        raise EspalierError(unknown("encoder", shape.encoder, ENCODERS))
    m = shape.members if members is None else members
    k, v = reader.operators, reader.nodes
    if shape.encoder == "flat":
        inputs = v * k if reader.on_edges else v * k + v * v
        return Flat(inputs, m, shape.width, shape.dropout)
    if shape.encoder == "gcn":
        if reader.on_edges:
            raise EspalierError("a GCN has operators on nodes: read with on_edges=False")
        return GCN(k, m, shape.width, shape.layers, shape.dropout)
    if shape.encoder == "flow":
        if reader.cell is None:
            raise EspalierError("the encoder flow reads cells with operators on edges: give a cell")
        cell = reader.cell
        return FlowOnEdges(cell.edges, k, cell.skip, m, shape.width, shape.dropout)
    if reader.on_edges and reader.cell is not None:
        return GatesOnEdges(reader.cell.edges, k, m, shape.width, shape.layers, shape.dropout)
    return GatesOnNodes(k, m, shape.width, shape.layers, shape.dropout)


def scored(forward: Callable[[Batch], Tensor], batch: Batch, rows: int = _ROWS) -> Tensor:
    """Scores of a batch in parts of `rows`, without gradients."""
    with torch.inference_mode():
        parts = [
            forward(batch.take(slice(i, i + rows))) for i in range(0, max(len(batch), 1), rows)
        ]
    return torch.cat(parts, 1)
