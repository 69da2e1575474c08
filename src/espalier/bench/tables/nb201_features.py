"""Features of NAS-Bench-201's cells for predictors, from the codes alone."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.estimators.predictors.features import Blocks
from espalier.nets.nb201 import EDGES, OPERATORS

Array = NDArray[np.float64]
Operators = NDArray[np.int64]

_NONE, _SKIP = OPERATORS.index("none"), OPERATORS.index("skip_connect")
_SMALL, _LARGE = OPERATORS.index("nor_conv_1x1"), OPERATORS.index("nor_conv_3x3")
_POOL = OPERATORS.index("avg_pool_3x3")
_WORKING = (_SMALL, _LARGE, _POOL)  # operators that change what goes through

_COLUMN = {edge: j for j, edge in enumerate(EDGES)}
# the ways from input to output, as columns of codes
_WAYS = tuple(
    tuple(_COLUMN[edge] for edge in way)
    for way in (((3, 0),), ((1, 0), (3, 1)), ((2, 0), (3, 2)), ((1, 0), (2, 1), (3, 2)))
)
_SEQUENCES = tuple(s for length in range(4) for s in product(_WORKING, repeat=length))
# in units of channels squared, with the batch norm of 16 channels: a 3x3, a 1x1, all the rest
_WEIGHTS = {_SMALL: 1.125, _LARGE: 9.125}
_REST = 2.65
_MEAN = 2.4  # of the logarithm over all cells


def live(codes: NDArray[Any]) -> Operators:
    """The operators `(n, 6)`, those that no signal crosses on its way to the output as "none"."""
    ops = np.asarray(codes, dtype=np.int64)
    used = np.zeros(ops.shape, dtype=np.bool_)
    for way in _WAYS:
        used[:, way] |= (ops[:, way] != _NONE).all(axis=1)[:, None]
    return np.where(used, ops, _NONE)


def one_hot(codes: NDArray[Any]) -> Array:
    """Which live operator stands on which edge `(n, 30)`."""
    hot = live(codes)[:, :, None] == np.arange(len(OPERATORS))
    return np.asarray(hot.reshape(len(codes), -1), dtype=np.float64)


def paths(codes: NDArray[Any]) -> Array:
    """Square roots of how often each sequence of operators leads through the cell `(n, 40)`.

    White et al., "BANANAS" (2021), with skip connections left out of the sequences, for they change
    nothing: 1 + 3 + 9 + 27 sequences.
    """
    ops = np.asarray(codes, dtype=np.int64)
    out = np.zeros((len(ops), len(_SEQUENCES)))
    digit = np.zeros(len(OPERATORS), dtype=np.int64)
    digit[list(_WORKING)] = np.arange(1, 4)
    place = np.zeros(4**3, dtype=np.int64)  # of a sequence as a number in base 4, without zeros
    for i, sequence in enumerate(_SEQUENCES):
        place[sum(int(digit[s]) * 4**k for k, s in enumerate(sequence))] = i
    for way in _WAYS:
        rows = np.flatnonzero((ops[:, way] != _NONE).all(axis=1))
        number, length = np.zeros(len(rows), dtype=np.int64), np.zeros(len(rows), dtype=np.int64)
        for column in way:
            step = digit[ops[rows, column]]
            number += step * 4**length
            length += step > 0
        out[rows, place[number]] += 1
    return np.sqrt(out)


def shape(codes: NDArray[Any]) -> Array:
    """How deep and wide the cell is `(n, 10)`, each scaled to a spread of about 1.

    Over the ways through the cell: the most convolutions, the most 3x3, the fewest convolutions,
    fewest and most poolings, the means of these three, whether the input is added to the output,
    and how many ways there are.
    """
    ops = np.asarray(codes, dtype=np.int64)
    open_ = np.stack([(ops[:, way] != _NONE).all(axis=1) for way in _WAYS], axis=1)
    counts = {}
    for name, kinds in {"conv": (_SMALL, _LARGE), "large": (_LARGE,), "pool": (_POOL,)}.items():
        hit = np.isin(ops, kinds)
        counts[name] = np.stack([hit[:, way].sum(axis=1) for way in _WAYS], axis=1)
    ways = open_.sum(axis=1)
    some = np.maximum(ways, 1)
    straight = np.stack([(ops[:, way] == _SKIP).all(axis=1) for way in _WAYS], axis=1)

    def most(name: str) -> Array:
        return np.asarray(np.where(open_, counts[name], 0).max(axis=1), dtype=np.float64)

    def fewest(name: str) -> Array:
        least = np.where(open_, counts[name], 9).min(axis=1)
        return np.asarray(np.where(ways > 0, least, 0), dtype=np.float64)

    def mean(name: str) -> Array:
        return np.asarray((counts[name] * open_).sum(axis=1) / some, dtype=np.float64)

    columns = [
        most("conv") / 0.8,
        most("large") / 0.8,
        fewest("conv") / 0.6,
        fewest("pool") / 0.4,
        most("pool") / 0.7,
        mean("conv") / 0.6,
        mean("large") / 0.5,
        mean("pool") / 0.5,
        straight.any(axis=1) / 0.4,
        np.log1p(ways) / 0.4,
    ]
    return np.stack(columns, axis=1)


def costs(codes: NDArray[Any]) -> Array:
    """The logarithm of the weight count `(n, 1)`, about 0 in the mean; MACs rise with it."""
    return np.log(_REST + weight_units(codes))[:, None] - _MEAN


def weight_units(codes: NDArray[Any]) -> Array:
    """Weights of the cell's live convolutions `(n,)`, in channels squared: about 9 and 1."""
    units = np.zeros(len(OPERATORS))
    for operator, weight in _WEIGHTS.items():
        units[operator] = weight
    return np.asarray(units[live(codes)].sum(axis=1))


encode = Blocks((one_hot, paths, shape, costs), widths=(30, 40, 10, 1), linear=(3,))
