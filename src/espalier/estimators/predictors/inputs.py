"""From codes or operator graphs to the tensors that encoders read, and to extra inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from espalier.errors import DataError
from espalier.estimators.predictors.cells import Cell

Array = NDArray[np.float64]
Extras = Callable[[Any], Array]


@dataclass(frozen=True)
class Batch:
    """`n` graphs as an encoder reads them, and `(n, k)` extra inputs of the scorer, or none."""

    graphs: tuple[Tensor, ...]
    extras: Tensor | None = None

    def __len__(self) -> int:
        return len(self.graphs[0])

    def take(self, rows: Tensor | slice) -> Batch:
        """Some of the rows."""
        return Batch(
            tuple(g[rows] for g in self.graphs),
            None if self.extras is None else self.extras[rows],
        )


class Reader:
    """Reads codes of a `Cell`, or operator graphs, into batches.

    `on_edges` keeps a cell's operators on its edges (GATES' first form); otherwise they become
    nodes. Without a cell, what is read are `Graphs`, or codes that `graphs` turns into `Graphs`.
    Extra inputs are the logarithm of a cell's weight count, and the columns of `extras(codes)`;
    they are standardised by the rows given to `fit`.
    """

    def __init__(
        self,
        cell: Cell | None = None,
        graphs: Callable[[Any], Any] | None = None,
        extras: Extras | None = None,
        on_edges: bool = True,
        weights: bool = True,
    ) -> None:
        self.cell, self.graphs, self.extras = cell, graphs, extras
        self.on_edges, self.weights = on_edges and cell is not None, weights and cell is not None
        self.nodes = self.operators = 0
        self.mean: Array = np.zeros(0)
        self.scale: Array = np.zeros(0)

    @property
    def width(self) -> int:
        """How many extra inputs a graph has."""
        return len(self.mean)

    def fit(self, x: Any) -> Batch:
        """Takes the sizes and the scales from `x`; gives it as a batch."""
        if self.cell is not None:
            self.nodes = len(self.cell.edges) + (0 if self.on_edges else 2)
            self.operators = len(self.cell.operators) + (0 if self.on_edges else 2)
        else:
            found = self._graphs(x)
            self.nodes, self.operators = found.operators.shape[1], len(found.vocabulary) - 1
        raw = self._raw(x)
        self.mean = raw.mean(0)
        spread = raw.std(0)
        self.scale = np.where(spread > 0, spread, 1.0)
        return self.read(x)

    def read(self, x: Any) -> Batch:
        """The batch of `x`, on the scales of `fit`. Errors: `DataError` before `fit`."""
        if not self.nodes:
            raise DataError("this predictor knows no data yet: call fit first")
        graphs = self._tensors(x)
        raw = self._raw(x)
        if raw.shape[1] == 0:
            return Batch(graphs)
        return Batch(graphs, torch.from_numpy((raw - self.mean) / self.scale).float())

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Sizes and scales as arrays, which `restore` reads."""
        sizes = np.array([self.nodes, self.operators], dtype=np.int64)
        return {"reader.sizes": sizes, "reader.mean": self.mean, "reader.scale": self.scale}

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Takes over what `arrays` gave."""
        self.nodes, self.operators = (int(v) for v in arrays["reader.sizes"])
        self.mean, self.scale = arrays["reader.mean"], arrays["reader.scale"]

    def _tensors(self, x: Any) -> tuple[Tensor, ...]:
        if self.cell is not None and self.on_edges:
            pruned = torch.from_numpy(self.cell.pruned(_codes(x)))
            live = (pruned != self.cell.none).unsqueeze(2)
            return (F.one_hot(pruned, self.operators).float() * live,)
        if self.cell is not None:
            operators, adjacency = self.cell.line_graph(_codes(x))
        else:
            found = self._graphs(x)
            operators, adjacency = found.operators, found.adjacency
        chosen = F.one_hot(torch.from_numpy(np.asarray(operators, np.int64)), self.operators + 1)
        return chosen[..., 1:].float(), torch.from_numpy(np.asarray(adjacency)).float()

    def _raw(self, x: Any) -> Array:
        columns: list[Array] = []
        if self.cell is not None and self.weights:
            columns.append(np.log1p(self.cell.weight(_codes(x)))[:, None])
        if self.extras is not None:
            columns.append(np.asarray(self.extras(x), dtype=np.float64))
        if columns:
            return np.concatenate(columns, 1)
        rows = len(x.operators) if hasattr(x, "operators") else len(x)
        return np.zeros((rows, 0))

    def _graphs(self, x: Any) -> Any:
        if hasattr(x, "operators"):
            return x
        if self.graphs is None:
            raise DataError("codes need a cell or a function that turns them into graphs")
        return self.graphs(_codes(x))


def _codes(x: Any) -> NDArray[np.int64]:
    return np.asarray(x)
