"""A small made-up table for the tests of the bench: 256 rows, two accuracies, a cost, seconds."""

from __future__ import annotations

from typing import Any

import numpy as np

from espalier.bench.table import Table
from espalier.problem import Metric
from espalier.space import Space, choice

SPACE = Space([choice(f"op{i}", "none", "skip", "conv1", "conv3") for i in range(4)])


def features(codes: Any) -> Any:
    """One-hot and the count of each option."""
    return np.asarray(SPACE.one_hot(codes), dtype=float)


def toy(noise: float = 0.5, seconds: bool = True, name: str = "toy", curves: bool = False) -> Table:
    """Accuracy rises with the options, less so together; test is validation with noise. With
    curves: 9 epochs, of which the last is the column."""
    rng = np.random.default_rng(5)
    codes = SPACE.enumerate()
    gain = np.array([0.0, 2.0, 5.0, 7.0])
    each = gain[np.asarray(codes, dtype=int)]
    clean = 60 + each.sum(1) + 0.3 * each[:, 0] * (codes[:, 1] == 1) - 0.2 * each[:, 2] ** 2
    columns = {
        "val_acc": clean + noise * rng.normal(size=len(codes)),
        "test_acc": clean + noise * rng.normal(size=len(codes)),
    }
    params = 1000.0 + 300.0 * (np.asarray(codes, dtype=float) ** 2).sum(1)
    curved = {n: v[:, None, None] for n, v in columns.items()}
    columns["params"] = params
    rise = 30.0 * np.exp(-np.arange(9) / 2.0)[None, None]
    rise = rise - rise[..., -1:]
    return Table(
        name=name,
        space=SPACE,
        codes=codes,
        columns=columns,
        about={
            "val_acc": Metric("val_acc", "%", "max", "measured", "validation"),
            "test_acc": Metric("test_acc", "%", "max", "measured", "test"),
            "params": Metric("params", "", "min", "counted"),
        },
        validation="val_acc",
        test="test_acc",
        source="made up for tests",
        curves={n: v - rise for n, v in curved.items()} if curves else {},
        epoch_seconds=params / 1000 if seconds else None,
        encode=features,
    )
