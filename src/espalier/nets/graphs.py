"""Graphs of operators: what predictors read of a network."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from espalier.errors import EspalierError


@dataclass(frozen=True)
class Graphs:
    """n operator graphs, padded to v nodes; nodes are in topological order.

    - `operators`: `(n, v)`, an index into `vocabulary`; 0 is padding.
    - `adjacency`: `(n, v, v)`, `adjacency[i, a, b]` means that a feeds b; nothing feeds backwards.
    - `vocabulary`: the operators' names; the first is "".

    Errors: `EspalierError` for shapes that do not fit together.
    """

    operators: NDArray[np.int64]
    adjacency: NDArray[np.bool_]
    vocabulary: tuple[str, ...]

    def __post_init__(self) -> None:
        shape = self.operators.shape
        if self.operators.ndim != 2 or self.adjacency.shape != (*shape, shape[1]):
            raise EspalierError(
                "graphs have operators (n, v) and adjacency (n, v, v), got "
                f"{shape} and {self.adjacency.shape}"
            )
        if not self.vocabulary or self.vocabulary[0] != "":
            raise EspalierError(f'a vocabulary begins with "" for padding, got {self.vocabulary}')

    def __len__(self) -> int:
        return len(self.operators)


def pruned(
    operators: NDArray[np.int64], adjacency: NDArray[np.bool_], source: int, sink: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Without the nodes that no path from `source` to `sink` goes through; those two stay.

    Nodes stand in topological order, so one pass in each direction finds what is reached.
    """
    n, v = operators.shape
    present = operators > 0
    edges = adjacency & present[:, :, None] & present[:, None, :]
    fed = np.zeros((n, v), dtype=bool)
    used = np.zeros((n, v), dtype=bool)
    fed[:, source] = True
    used[:, sink] = True
    for b in range(v):
        if b != source:
            fed[:, b] = (fed & edges[:, :, b]).any(axis=1)
    for a in reversed(range(v)):
        if a != sink:
            used[:, a] = (used & edges[:, a, :]).any(axis=1)
    alive = fed & used
    ends = np.zeros(v, dtype=bool)
    ends[[source, sink]] = True
    edges = edges & alive[:, :, None] & alive[:, None, :]
    return np.where(alive | ends, operators, 0), edges
