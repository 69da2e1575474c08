"""Tables of measured latencies alone: costs of a space, without accuracies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.bench.table import Table
from espalier.problem import Metric
from espalier.space import Space


def priced(
    name: str,
    space: Space,
    codes: NDArray[Any],
    latencies: Mapping[str, NDArray[Any]],
    source: str,
    encode: Callable[[NDArray[Any]], NDArray[np.float64]],
) -> Table:
    """A table whose columns are latencies in ms, each by its name in the file."""
    return Table(
        name=name,
        space=space,
        codes=np.asfortranarray(codes),
        columns={column: values.astype(np.float64) for column, values in latencies.items()},
        about={column: Metric(column, "ms", "min", "measured") for column in latencies},
        validation="",
        test="",
        source=source,
        encode=encode,
    )


def codes_of(space: Space, found: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """Codes of columns that hold options, named as the decisions; inactive ones are canonical.

    Errors: `SpaceError` for an option that a decision does not have.
    """
    columns = []
    for decision in space.decisions:
        options, inverse = np.unique(found[decision.name], return_inverse=True)
        known = np.array([decision.code(option.item()) for option in options], dtype=space.dtype)
        columns.append(known[inverse])
    return space.canonical(np.stack(columns, axis=1))
