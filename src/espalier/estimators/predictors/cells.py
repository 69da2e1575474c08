"""Cells whose operators stand on edges: dead edges, operator graphs and weight counts, batched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from espalier.errors import DataError

Operators = NDArray[np.int64]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Cell:
    """A cell of fixed edges; a row of codes gives each edge its operator.

    Node 0 is the input, the last node the output, and `edges[e] = (a, b)` with a < b says that
    column e of the codes is the operator from node a to node b. `weights` are the relative weight
    counts of the operators; `none` is the one that passes nothing on, `skip` the one that passes
    everything on as it is, if there is one. Errors: `DataError`.
    """

    edges: tuple[tuple[int, int], ...]
    operators: tuple[str, ...]
    weights: tuple[float, ...]
    none: int = 0
    skip: int | None = None

    def __post_init__(self) -> None:
        if any(a >= b or a < 0 for a, b in self.edges):
            raise DataError(f"edges go from a lower node to a higher one, got {self.edges}")
        if len(self.weights) != len(self.operators):
            raise DataError(
                f"{len(self.operators)} operators need as many weights, got {len(self.weights)}"
            )

    @property
    def nodes(self) -> int:
        """How many nodes there are, input and output included."""
        return max(b for _, b in self.edges) + 1

    def pruned(self, codes: Operators) -> Operators:
        """The codes `(n, e)` with every edge that no signal crosses set to `none`.

        An edge lives when a path of other operators than `none` leads from the input over it to
        the output. Cells that differ in dead edges alone compute the same.
        """
        codes = self._checked(codes)
        on = codes != self.none
        fed, used = self._reach(on, forward=True), self._reach(on, forward=False)
        live = np.stack([fed[:, a] & used[:, b] for a, b in self.edges], 1)
        return np.where(live, codes, self.none)

    def _reach(self, on: NDArray[np.bool_], forward: bool) -> NDArray[np.bool_]:
        """Which nodes `(n, v)` the input reaches, or reach the output."""
        reach = np.zeros((len(on), self.nodes), dtype=bool)
        reach[:, 0 if forward else -1] = True
        order = sorted(range(len(self.edges)), key=lambda e: self.edges[e][1 if forward else 0])
        for e in order if forward else reversed(order):
            a, b = self.edges[e] if forward else self.edges[e][::-1]
            reach[:, b] |= reach[:, a] & on[:, e]
        return reach

    def weight(self, codes: Operators) -> Array:
        """The relative weight count `(n,)` of the live operators."""
        weights = np.asarray(self.weights, dtype=np.float64)
        return np.asarray(weights[self.pruned(codes)].sum(1))

    def line_graph(self, codes: Operators) -> tuple[Operators, NDArray[np.bool_]]:
        """The same cells with operators on nodes: operators `(n, e + 2)`, adjacency.

        Node 0 is the input, then a node an edge, then the output. An operator's index is raised by
        3: 0 is padding (a dead edge), 1 the input, 2 the output. `adjacency[i, a, b]`: a feeds b.
        """
        codes = self.pruned(codes)
        live = codes != self.none
        n, e = codes.shape
        operators = np.zeros((n, e + 2), dtype=np.int64)
        operators[:, 0], operators[:, -1] = 1, 2
        operators[:, 1:-1] = np.where(live, codes + 3, 0)
        joined = np.zeros((e + 2, e + 2), dtype=bool)
        for i, (a, b) in enumerate(self.edges):
            joined[0, i + 1] = a == 0
            joined[i + 1, -1] = b == self.nodes - 1
            for j, (c, _) in enumerate(self.edges):
                joined[i + 1, j + 1] = b == c
        alive = operators > 0
        return operators, joined & alive[:, :, None] & alive[:, None, :]

    def _checked(self, codes: Operators | Sequence[Sequence[int]]) -> Operators:
        codes = np.asarray(codes)
        if codes.ndim != 2 or codes.shape[1] != len(self.edges):
            raise DataError(f"codes need {len(self.edges)} columns, got shape {codes.shape}")
        whole = codes.astype(np.int64)
        if (whole != codes).any() or (whole < 0).any() or (whole >= len(self.operators)).any():
            raise DataError(f"codes are indices of {len(self.operators)} operators")
        return whole


# NAS-Bench-201's cell (Dong & Yang, 2020), columns as in its table: op_1_0, op_2_0, op_2_1, ...
NB201 = Cell(
    edges=((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)),
    operators=("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3"),
    weights=(0.0, 0.0, 1.0, 9.0, 0.0),
    skip=1,
)
