"""`espalier bench`: loads a table, runs a race, judges estimators, writes the page."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from espalier.bench import page
from espalier.bench.criteria import criteria, operator_counts
from espalier.bench.progress import display
from espalier.bench.protocol import race
from espalier.errors import EspalierError, unknown
from espalier.flows.machine import machine, versions

if TYPE_CHECKING:
    from espalier.bench.table import Table

_JUDGED = 3000  # rows, drawn at random: enough for intervals of a hundredth


def bench(
    table: Table | str,
    strategies: str = "random,evolution,guided",
    queries: int = 100,
    seeds: int = 20,
    *,
    objectives: Sequence[str] | None = None,
    within: Mapping[str, str] | None = None,
    workers: int = 0,
    batch: int = 1,
    jobs: int = 1,
    estimators: Sequence[str] = (),
    out: Path | None = None,
    quiet: bool = True,
) -> tuple[dict[str, Any], dict[str, Path]]:
    """Runs a race and writes its report into `out`, by default a folder under `runs/`.

    `table` is a table or its name, "nb201:dataset=cifar100"; `estimators` are columns of the table
    that are judged as estimators of the test result. Gives the result as JSON and the files by
    kind. The folder keeps every finished run: the same call goes on from it.
    """
    if isinstance(table, str):
        from espalier.bench import tables

        table = tables.load(table)
    judged = {name: judge_column(table, name) for name in estimators}
    settings = (queries, batch, workers, list(objectives or ()), dict(within or {}))
    where = out or _folder(table.name, settings)
    with display(quiet) as progress:
        found = race(
            table,
            strategies,
            queries,
            seeds,
            batch=batch,
            workers=workers,
            objectives=objectives,
            within=within,
            jobs=jobs,
            out=where,
            progress=progress,
        )
    result = {
        **found.to_json(),
        "estimators": judged,
        "command": "espalier " + shlex.join(sys.argv[1:]) if sys.argv[1:2] == ["bench"] else "",
        "machine": machine(),
        "versions": versions(),
    }
    files = page.write(result, where)
    return {**result, "files": {kind: str(path) for kind, path in files.items()}}, files


def _folder(table: str, settings: Any) -> Path:
    """A folder of its own for every setting, so that the same call finds its runs again."""
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:6]
    return Path("runs") / re.sub(r"[^A-Za-z0-9_.-]+", "-", f"bench-{table}-{digest}")


def judge_column(table: Table, name: str, resamples: int = 100) -> dict[str, Any]:
    """A column of a table judged as an estimator of its test results, on at most 3,000 rows.

    A cost counts as "more is better": a search that trusts it takes the largest networks.
    """
    if name not in table.columns:
        raise EspalierError(unknown(f"metric of {table.name}", name, table.columns))
    if not table.test:
        raise EspalierError(
            f"{table.name} is a table of costs: it has no test results to judge {name} by"
        )
    rows = np.arange(len(table.codes))
    if len(rows) > _JUDGED:
        rows = np.sort(np.random.default_rng(0).choice(rows, _JUDGED, replace=False))
    truth = _rising(table, table.test)[rows]
    scores = np.asarray(table.columns[name], dtype=float)[rows]
    if table.about[name].split and table.about[name].goal == "min":
        scores = -scores  # a loss or a perplexity
    size = next((table.columns[c] for c in ("params", "macs") if c in table.columns), None)
    return criteria(
        scores,
        truth,
        complexity=None if size is None else size[rows],
        operators=operator_counts(table.space, table.codes[rows]),
        resamples=resamples,
    )


def _rising(table: Table, name: str) -> Any:
    sign = 1.0 if table.about[name].goal == "max" else -1.0
    return sign * np.asarray(table.columns[name], dtype=float)
