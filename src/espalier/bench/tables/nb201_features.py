"""Features of NAS-Bench-201's cells for predictors, from the codes alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.nets.nb201 import EDGES, OPERATORS, SPACE

Array = NDArray[np.float64]

_COLUMN = {edge: j for j, edge in enumerate(EDGES)}
# the ways from input to output, as columns of codes
_PATHS = tuple(
    tuple(_COLUMN[edge] for edge in path)
    for path in (((3, 0),), ((1, 0), (3, 1)), ((2, 0), (3, 2)), ((1, 0), (2, 1), (3, 2)))
)
_CONV = {OPERATORS.index("nor_conv_1x1"): 1, OPERATORS.index("nor_conv_3x3"): 9}


def encode(codes: NDArray[Any]) -> Array:
    """Features `(n, 173)`: one-hot operators, paths, and the logarithms of parameters and MACs.

    A path is the sequence of operators on a way from input to output, without "none"; a column is 1
    where the cell has that sequence (White et al., "BANANAS", 2021).
    """
    hot = SPACE.one_hot(codes).astype(np.float64)
    weights = weight_units(codes)
    # the stem, the two reductions and the head are the same for all
    costs = np.log1p(np.stack([weights, weights + 12.0], axis=1))
    return np.concatenate([hot, paths(codes), costs], axis=1)


def paths(codes: NDArray[Any]) -> Array:
    """Which sequences of operators `(n, 5 + 25 + 125 - those with "none")` lead through the cell."""
    base, kinds = np.asarray(codes, dtype=np.int64) - 1, len(OPERATORS) - 1
    parts = []
    for length in (1, 2, 3):
        here = np.zeros((len(base), kinds**length))
        for path in (p for p in _PATHS if len(p) == length):
            steps = base[:, path]
            rows = np.flatnonzero((steps >= 0).all(axis=1))
            number = steps[rows] @ (kinds ** np.arange(length)[::-1])
            here[rows, number] = 1
        parts.append(here)
    return np.concatenate(parts, axis=1)


def weight_units(codes: NDArray[Any]) -> Array:
    """Weights of the cell's convolutions `(n,)`: 9 for a 3x3, 1 for a 1x1, in channels squared."""
    units = np.array([_CONV.get(i, 0) for i in range(len(OPERATORS))], dtype=np.float64)
    return np.asarray(units[np.asarray(codes, dtype=np.int64)].sum(axis=1))
