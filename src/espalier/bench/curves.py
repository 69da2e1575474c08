"""A table with learning curves as one in which the number of epochs is a decision."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.bench.table import Table
from espalier.errors import EspalierError
from espalier.nets.graphs import Graphs
from espalier.solvers.strategies.levels import extended

Codes = NDArray[Any]
Array = NDArray[np.float64]


def with_epochs(table: Table, levels: Iterable[int]) -> Table:
    """The table with one more decision, "epochs": each candidate after each of `levels` epochs.

    Row i at level k is row `i * len(levels) + k`. The validation column is that of the first
    training, for a query is one training; another column with a curve is the mean of all trainings;
    one without is what it is at any epoch. `epoch_seconds` are those of the whole training up to
    the level; where the table knows none, a full training is 1.
    Errors: `EspalierError` for a table without curves, and for levels that they do not have.
    """
    if table.validation not in table.curves:
        raise EspalierError(
            f"{table.name} has no learning curves of {table.validation!r}: take a table that has, "
            "such as digits"
        )
    epochs = table.curves[table.validation].shape[-1]
    chosen = sorted(set(levels))
    if not chosen or any(int(e) != e or not 1 <= e <= epochs for e in chosen):
        raise EspalierError(f"levels are epochs from 1 to {epochs}, got {chosen}")
    rungs = len(chosen)
    space = extended(table.space, chosen)
    codes = np.empty((len(table) * rungs, len(space)), dtype=space.dtype, order="F")
    codes[:, :-1] = np.repeat(table.codes, rungs, axis=0)
    codes[:, -1] = np.tile(np.arange(rungs), len(table))
    at = np.array(chosen) - 1
    columns = {
        name: _read(table, name)[:, at].ravel()
        if name in table.curves
        else np.repeat(values, rungs)
        for name, values in table.columns.items()
    }
    each = np.ones(len(table)) / epochs if table.epoch_seconds is None else table.epoch_seconds
    shown = "|".join(map(str, chosen))
    return Table(
        name=f"{table.name} at {shown} epochs",
        space=space,
        codes=codes,
        columns=columns,
        about=table.about,
        validation=table.validation,
        test=table.test,
        source=table.source,
        epoch_seconds=np.outer(each, chosen).ravel(),
        encode=None if table.encode is None else partial(_encode, table, tuple(chosen)),
        graphs=None if table.graphs is None else partial(_graphs, table),
    )


def _read(table: Table, name: str) -> Array:
    """A metric after each epoch, `(n, epochs)`."""
    curve = table.curves[name]
    read: Array = curve[:, 0] if name == table.validation else curve.mean(axis=1)
    return read


def _encode(table: Table, levels: tuple[int, ...], codes: Codes) -> Array:
    """The table's features, and the logarithm of the epochs."""
    assert table.encode is not None
    epochs = np.log(np.array(levels, dtype=float))[np.asarray(codes[:, -1], dtype=np.int64)]
    return np.column_stack([table.encode(_inner(table, codes)), epochs])


def _graphs(table: Table, codes: Codes) -> Graphs:
    assert table.graphs is not None
    return table.graphs(_inner(table, codes))


def _inner(table: Table, codes: Codes) -> Codes:
    return np.asarray(codes[:, :-1]).astype(table.space.dtype)
