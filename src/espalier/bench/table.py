"""A tabular benchmark: a space, and what is known of its candidates from real trainings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.costs.tabulated import Columns, TabularCost
from espalier.errors import DataError, EspalierError, unknown
from espalier.estimators.tabular import Tabular
from espalier.nets.graphs import Graphs
from espalier.problem import Metric, Metrics
from espalier.space import Space
from espalier.space.lookup import Lookup

Codes = NDArray[Any]
Array = NDArray[np.float64]
Index = NDArray[np.int64]


@dataclass(frozen=True)
class Table:
    """n candidates of a space with what was found out about each.

    - `name`: as `tables.load` takes it, "nb201:dataset=cifar100".
    - `space`, `codes`: the space, and the candidates `(n, d)`: canonical, valid, each once.
    - `columns`, `about`: metric to numbers `(n,)`, and to its unit, goal, origin and split.
    - `validation`, `test`: the column that chooses and the one that reports; "" for a table of
      costs only.
    - `source`: the origin, in words.
    - `curves`: metric to `(n, seeds, epochs)`, where the table has learning curves.
    - `epoch_seconds`: `(n,)` seconds of one epoch of training; None where they are not known, and
      a query costs 1.
    - `encode`: features `(m, k)` of codes `(m, d)` for predictors, from the codes alone.
    - `graphs`: operator graphs of codes.

    Errors: `DataError` for columns or codes that do not fit together.
    """

    name: str
    space: Space
    codes: Codes
    columns: Mapping[str, Array]
    about: Mapping[str, Metric]
    validation: str
    test: str
    source: str
    curves: Mapping[str, Array] = field(default_factory=dict)
    epoch_seconds: Array | None = None
    encode: Callable[[Codes], Array] | None = None
    graphs: Callable[[Codes], Graphs] | None = None

    def __post_init__(self) -> None:
        _check_codes(self)
        _check_columns(self)

    def __len__(self) -> int:
        return len(self.codes)

    # --- looking up ---------------------------------------------------------------------------

    @cached_property
    def lookup(self) -> Lookup:
        """Row numbers of codes; what `find` and `rows` ask."""
        return Lookup(self.space, self.codes, self.name)

    def find(self, codes: Codes) -> Index:
        """Row numbers `(m,)` of canonical codes `(m, d)`, -1 where the table has no such row."""
        return self.lookup.find(codes)

    def rows(self, codes: Codes) -> Index:
        """As `find`. Errors: `EspalierError` names the first candidate that is absent."""
        return self.lookup.rows(codes)

    def metrics(self, names: Sequence[str], codes: Codes) -> Metrics:
        """Columns for codes `(m, d)`. Errors: `EspalierError` for an unknown column or row."""
        return self._look(names)(codes)

    def estimator(self, *names: str) -> Tabular:
        """An estimator that reads columns; without names, the validation column."""
        chosen = names or (self._quality("validation"),)
        return Tabular(self.space, self._described(chosen), self._look(chosen))

    def cost(self, *names: str) -> TabularCost:
        """A cost that reads columns, for the limits and objectives of a study."""
        if not names:
            known = ", ".join(self.columns)
            raise EspalierError(f"{self.name}: name the columns that are costs, of: {known}")
        return TabularCost(self.space, self._described(names), self._look(names))

    def _look(self, names: Sequence[str]) -> Callable[[Codes], Metrics]:
        """What gives the columns of codes."""
        about = self._described(names)
        return Columns(self.lookup, {m.name: self.columns[m.name] for m in about}, about)

    def _described(self, names: Sequence[str]) -> tuple[Metric, ...]:
        for name in names:
            if name not in self.columns:
                raise EspalierError(unknown(f"column of {self.name}", name, self.columns))
        return tuple(self.about[name] for name in names)

    # --- choosing and reporting ---------------------------------------------------------------

    def best(self) -> int:
        """The row with the best validation, the first of equals."""
        name = self._quality("validation")
        sign = 1.0 if self.about[name].goal == "max" else -1.0
        return int(np.nanargmax(sign * self.columns[name]))

    def regret(self, row_index: Any) -> Array:
        """What rows lose in `test` against the table's best `test`, in its unit, at least 0.

        That best is out of reach of an honest search, which chooses by validation: the regret of
        `best()` is what a perfect search has.
        """
        name = self._quality("test")
        sign = 1.0 if self.about[name].goal == "max" else -1.0
        values = sign * self.columns[name]
        return np.asarray(np.nanmax(values) - values[row_index], dtype=np.float64)

    def _quality(self, role: str) -> str:
        name: str = getattr(self, role)
        if not name:
            raise EspalierError(
                f"{self.name} is a table of costs and has no {role} column: use its columns as "
                f"costs ({', '.join(list(self.columns)[:4])}, ...)"
            )
        return name

    def __getstate__(self) -> dict[str, Any]:
        # what can be made again does not travel
        return {k: v for k, v in self.__dict__.items() if k != "lookup"}


def _check_codes(table: Table) -> None:
    space, codes = table.space, table.codes
    if codes.ndim != 2 or codes.shape[1] != len(space) or codes.dtype != space.dtype:
        raise DataError(
            f"{table.name}: codes are (n, {len(space)}) of {space.dtype}, got {codes.shape} of "
            f"{codes.dtype}"
        )
    good = space.valid(codes) & (space.canonical(codes) == codes).all(axis=1)
    if not good.all():
        row = int(np.flatnonzero(~good)[0])
        raise DataError(
            f"{table.name}: codes must be valid and canonical, row {row} is not: "
            f"{codes[row].tolist()}"
        )
    if len(space.unique(codes)) < len(codes):
        raise DataError(f"{table.name}: each candidate has one row, some have more: drop repeats")


def _check_columns(table: Table) -> None:
    odd = sorted(set(table.columns) ^ set(table.about))
    if odd:
        raise DataError(f"{table.name}: every column needs its Metric and the reverse, got {odd}")
    n = len(table.codes)
    sized = {**table.columns, **{f"the curve of {k}": v for k, v in table.curves.items()}}
    if table.epoch_seconds is not None:
        sized["epoch_seconds"] = table.epoch_seconds
    for name, values in sized.items():
        if len(values) != n:
            raise DataError(f"{table.name}: {name} has {len(values)} rows, the table {n}")
    for role in (table.validation, table.test):
        if role and role not in table.columns:
            raise DataError(f"{table.name}: {unknown('column', role, table.columns)}")
