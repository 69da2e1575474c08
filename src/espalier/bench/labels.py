"""What a predictor ranks right with few labels: Kendall's tau on cells that it has not seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from espalier.bench.criteria import kendall
from espalier.bench.table import Table
from espalier.errors import EspalierError

Array = NDArray[np.float64]
Index = NDArray[np.int64]
_HELD = 20_201_118  # seeds the draw of the rows that are held out


class Learner(Protocol):
    """What learns from codes and labels: a regressor on codes, or a predictor."""

    def fit(self, x: Any, y: Any, seed: int = 0) -> Any:
        """Learns from rows and their labels."""

    def predict(self, x: Any) -> tuple[Array, Array]:
        """Mean and standard deviation."""


def split(table: Table, seed: int, labels: int, held: int = 3000) -> tuple[Index, Index]:
    """Rows that are labelled `(labels,)`, drawn by `seed`, and rows held out `(held,)`.

    The rows held out are drawn once from a table, the same for all seeds and numbers of labels; the
    first labels of a draw are those of a smaller one. Tables of few rows hold half of them out.
    Errors: `EspalierError` for more labels than there are rows left.
    """
    held = min(held, len(table) // 2)
    order = np.random.default_rng(_HELD).permutation(len(table))
    rest = np.sort(order[held:])
    if not 2 <= labels <= len(rest):
        raise EspalierError(
            f"{table.name} has {len(rest)} rows to label beside the {held} held out: ask for 2 to "
            f"{len(rest)}, got {labels}"
        )
    return np.random.default_rng(seed).permutation(rest)[:labels], order[:held]


def tau(
    table: Table,
    make: Callable[[int], Learner],
    labels: int,
    seeds: Sequence[int],
    held: int = 3000,
) -> dict[str, Array]:
    """Kendall's tau `(seeds,)` of predictors fitted on `labels` validation labels each.

    `make(seed)` gives the learner of a seed. "validation" is tau against the column that chooses,
    "test" against the one that reports.
    """
    found: dict[str, list[float]] = {"validation": [], "test": []}
    signs = {
        role: 1.0 if table.about[getattr(table, role)].goal == "max" else -1.0 for role in found
    }
    for seed in seeds:
        train, rest = split(table, seed, labels, held)
        learner = make(seed)
        truth = signs["validation"] * table.columns[table.validation]
        learner.fit(table.codes[train], truth[train], seed)
        mean, _ = learner.predict(table.codes[rest])
        for role, taus in found.items():
            column = signs[role] * table.columns[getattr(table, role)]
            taus.append(kendall(mean, column[rest]))
    return {role: np.array(taus) for role, taus in found.items()}


def ahead(a: Array, b: Array) -> dict[str, float | bool]:
    """The mean gap of paired results, its standard error, and whether it is over two of these."""
    gaps = np.asarray(a) - np.asarray(b)
    error = float(gaps.std(ddof=1) / np.sqrt(len(gaps))) if len(gaps) > 1 else float("inf")
    mean = float(gaps.mean())
    return {"gap": mean, "standard_error": error, "holds": mean > 2 * error and len(gaps) > 1}
