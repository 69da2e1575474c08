"""Networks of tables as their ONNX files are: built, exported and read as operator graphs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from espalier.bench.table import Table
from espalier.bench.tables import load
from espalier.errors import DataError
from espalier.estimators.predictors.opgraph import OpGraph, from_onnx
from espalier.export import to_onnx
from espalier.nets import Family
from espalier.nets.macro import NBMacro
from espalier.nets.nb201 import NB201

_SIDE = 32
# NAS-Bench-201's cells are repeated 15 times; once a stage tells them apart as well
_FAMILIES: dict[str, Family] = {"nb201": NB201(cells=1), "nb_macro": NBMacro()}


@dataclass(frozen=True)
class Exported:
    """Rows of a table with their operator graphs; `macs`, `params` are the table's."""

    table: Table
    rows: NDArray[np.int64]
    graphs: tuple[OpGraph, ...]

    def column(self, name: str) -> NDArray[np.float64]:
        """A column of the table for these rows."""
        return np.asarray(self.table.columns[name][self.rows], dtype=np.float64)


def exported(name: str, count: int, seed: int = 0, folder: Path | None = None) -> Exported:
    """`count` random rows of the table "nb201" or "nb_macro", each exported; kept in `folder`.

    Takes 0.1 s a network. Errors: `DataError` for a damaged file in `folder`.
    """
    table = load(name)
    rows = np.random.default_rng(seed).permutation(len(table))[:count]
    file = None if folder is None else Path(folder) / f"exported_{name}_{count}_{seed}.json"
    if file is not None and file.exists():
        return Exported(table, rows, _stored(file, count))
    family = _FAMILIES[name]
    example = torch.zeros(1, 3, _SIDE, _SIDE)
    graphs = tuple(
        from_onnx(to_onnx(family.build(candidate), example, fast=True))
        for candidate in table.space.decode(table.codes[rows])
    )
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps([g.to_json() for g in graphs]))
    return Exported(table, rows, graphs)


def _stored(file: Path, count: int) -> tuple[OpGraph, ...]:
    try:
        data: list[Any] = json.loads(file.read_text())
        graphs = tuple(OpGraph.from_json(d) for d in data)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"{file.name} is no file of operator graphs ({error}): delete it"
        ) from error
    if len(graphs) != count:
        raise DataError(f"{file.name} holds {len(graphs)} graphs, not {count}: delete it")
    return graphs
