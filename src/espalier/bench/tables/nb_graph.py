"""NAS-Bench-Graph: graph neural networks of four operators on nine graphs.

Qin, Zhang, Zhang & Zhu, "NAS-Bench-Graph: Benchmarking Graph Neural Architecture Search", NeurIPS
2022 (https://arxiv.org/abs/2206.09166). An architecture is a tree of four operators under the
input; what no operator reads is the output. 26,206 architectures were measured (2,021 on proteins):
one of each kind, where two are of a kind when they compute the same. Here every row of the space
has the numbers of its kind.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.bench.table import Table
from espalier.bench.tables.files import Source
from espalier.bench.tables.nb_graph_trees import (
    PROTEINS,
    SPACE,
    encode,
    encode_proteins,
    graphs,
    graphs_proteins,
    kinds,
)
from espalier.errors import DataError
from espalier.problem import Metric
from espalier.space import Space

GRAPHS = (
    "cora", "citeseer", "pubmed", "cs", "physics", "photo", "computers", "arxiv", "proteins"
)  # fmt: skip
OPTIONS = {"graph": GRAPHS}
FILE = Source(
    "nasbench_graph",
    "nasbench_graph_light.parquet",
    "cfb8949adf7c0ec36b554f6628c69cd4bc3b21653242e60565a009a18a11ba8c",
    "https://github.com/THUMNLab/NAS-Bench-Graph, nas-bench-graph/light",
)


def load(graph: str = "cora") -> Table:
    """Columns: `val_acc` and `test_acc` in % (on proteins `val_auc` and `test_auc`, areas under the
    ROC curve), `latency_ms` as measured, `params`.

    Errors: `DataError` where the file is absent or another one.
    """
    found = FILE.read(
        ["dataset", *SPACE.names,
         "valid_perf", "test_perf", "latency", "params_M"]
    )  # fmt: skip
    here = found["dataset"] == graph
    domain = PROTEINS if graph == "proteins" else SPACE
    measured = _codes(domain, {name: column[here] for name, column in found.items()})
    codes = domain.enumerate()
    kind = dict(zip(kinds(domain, measured).tolist(), range(len(measured)), strict=True))
    rows = np.array([kind.get(k, -1) for k in kinds(domain, codes).tolist()])
    if len(kind) < len(measured) or rows.min() < 0:
        raise DataError(
            f"nb_graph: the file must hold one architecture of each kind, on {graph} it has "
            f"{len(measured)} architectures of {len(kind)} kinds, and lacks {(rows < 0).sum()} rows"
        )
    word = "auc" if graph == "proteins" else "acc"
    sources = {
        f"val_{word}": ("valid_perf", 100.0),
        f"test_{word}": ("test_perf", 100.0),
        "latency_ms": ("latency", 1e3),
        "params": ("params_M", 1e6),
    }
    columns = {
        name: found[column][here][rows].astype(np.float64) * scale
        for name, (column, scale) in sources.items()
    }
    about = [
        Metric(f"val_{word}", "%", "max", "measured", "validation"),
        Metric(f"test_{word}", "%", "max", "measured", "test"),
        Metric("latency_ms", "ms", "min", "measured"),
        Metric("params"),
    ]
    return Table(
        name=f"nb_graph:graph={graph}",
        space=domain,
        codes=codes,
        columns=columns,
        about={metric.name: metric for metric in about},
        validation=f"val_{word}",
        test=f"test_{word}",
        source=f"NAS-Bench-Graph (2022) on {graph}, {len(measured):,} architectures; rows that "
        "compute the same share one's numbers",
        encode=encode_proteins if graph == "proteins" else encode,
        graphs=graphs_proteins if graph == "proteins" else graphs,
    )


def _codes(domain: Space, found: dict[str, NDArray[Any]]) -> NDArray[Any]:
    columns = []
    for decision in domain.decisions:
        index = {str(option): i for i, option in enumerate(decision.options)}
        unknown = sorted(set(found[decision.name].tolist()) - set(index))
        if unknown:
            raise DataError(
                f"nb_graph: {decision.name} is one of {list(index)}, got {unknown[0]!r}"
            )
        columns.append([index[value] for value in found[decision.name].tolist()])
    return np.asfortranarray(np.array(columns, dtype=domain.dtype).T)
