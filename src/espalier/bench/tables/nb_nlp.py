"""NAS-Bench-NLP on WikiText-2: recurrent cells with learning curves of 50 epochs.

Klyuchnikov, Trofimov, Artemova, Salnikov, Fedorov, Filippov & Burnaev, "NAS-Bench-NLP: Neural
Architecture Search Benchmark for Natural Language Processing" (2020),
https://arxiv.org/abs/2006.07116. Of its 345 trainings on this text, 4 diverged. The cells are
graphs of free size, drawn at random: no space of decisions holds them, so the one decision is which
row of the file. A strategy that learns from decisions learns nothing here; one that looks at
learning curves does.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.bench.table import Table
from espalier.bench.tables.files import Source
from espalier.errors import DataError
from espalier.problem import Metric
from espalier.space import Space, choice

FILE = Source(
    "nasbench_nlp_wikitext2",
    "nasbench_nlp_wikitext2.parquet",
    "bbdb8f3d47d8e698dcf448e5da699a200498438be1e8d4f024c5b123e19495e2",
    "from the logs of WikiText-2 in github.com/fmsnew/nas-bench-nlp-release, a row a training",
)
OPTIONS: dict[str, tuple[str, ...]] = {}
EPOCHS = 50
OPERATORS = (
    "linear",
    "activation_sigm",
    "activation_tanh",
    "activation_leaky_relu",
    "elementwise_sum",
    "elementwise_prod",
    "blend",
)


@cache
def load() -> Table:
    """`val_loss` (chooses) and `test_loss` in nats a token after 50 epochs, `params`.

    Curves of both losses; `epoch_seconds` as it took on the authors' machines. A training that
    diverged has NaN from there on. Errors: `DataError` where the file is absent or another one.
    """
    lists = ["wall_times", "val_losses", "test_losses"]
    found = FILE.read(["recepie", "num_params", *lists])
    n = len(found["recepie"])
    curves = {k: np.stack([_padded(row) for row in found[k]]) for k in lists}
    seconds = np.nanmean(curves["wall_times"], axis=1)
    space = Space([choice("cell", *range(n))])
    features = np.array([_features(text) for text in found["recepie"]])
    params = found["num_params"].astype(np.float64)
    about = [
        Metric("val_loss", "nats", "min", "measured", "validation"),
        Metric("test_loss", "nats", "min", "measured", "test"),
        Metric("params"),
    ]
    return Table(
        name="nb_nlp",
        space=space,
        codes=np.arange(n)[:, None].astype(space.dtype),
        columns={
            "val_loss": curves["val_losses"][:, -1],
            "test_loss": curves["test_losses"][:, -1],
            "params": params,
        },
        about={metric.name: metric for metric in about},
        validation="val_loss",
        test="test_loss",
        source=f"NAS-Bench-NLP (2020) on WikiText-2, {n} recurrent cells, {EPOCHS} epochs, one "
        "training each",
        curves={
            "val_loss": curves["val_losses"][:, None],
            "test_loss": curves["test_losses"][:, None],
        },
        epoch_seconds=seconds,
        encode=_Features(np.column_stack([features, np.log(params)])),
    )


class _Features:
    """How often each operator is in a cell, the nodes, and the logarithm of the parameters."""

    def __init__(self, features: NDArray[np.float64]) -> None:
        self.features = features

    def __call__(self, codes: NDArray[Any]) -> NDArray[np.float64]:
        return self.features[np.asarray(codes[:, 0], dtype=np.int64)]


def _features(text: str) -> list[float]:
    nodes = json.loads(text).values()
    operators = [node["op"] for node in nodes]
    odd = set(operators) - set(OPERATORS)
    if odd:
        raise DataError(f"{FILE.name}: unknown operators {sorted(odd)} in a cell")
    return [float(operators.count(name)) for name in OPERATORS] + [float(len(operators))]


def _padded(curve: Any) -> NDArray[np.float64]:
    """A curve of all epochs; NaN from where the training ended early. A missing number is NaN."""
    known = np.array([np.nan if x is None else x for x in curve], dtype=float)[:EPOCHS]
    return np.concatenate([known, np.full(EPOCHS - len(known), np.nan)])
