"""A table that answers for every candidate of its space: measured rows, and a model for the rest.

For benchmarks that are a sample of a space far too large to measure (Zela et al., "Surrogate NAS
Benchmarks: Going Beyond the Limited Search Spaces of Tabular NAS Benchmarks", 2022). What a model
of a metric is worth is stated by its error on rows that it was not fitted on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.bench.table import Table
from espalier.errors import DataError
from espalier.problem import Metric, Metrics
from espalier.space.lookup import Lookup

Codes = NDArray[Any]
Array = NDArray[np.float64]
Model = Callable[[Codes], Array]


@dataclass(frozen=True)
class HeldOut:
    """How well a model predicts rows it was not fitted on.

    - `r2`: the share of variance explained; `spearman`: the correlation of ranks.
    - `error`: the median of the errors, each as a share of its value.
    - `rows`: how many rows were held out.
    """

    r2: float
    spearman: float
    error: float
    rows: int


@dataclass(frozen=True)
class Surrogate(Table):
    """A table whose `metrics`, estimators and costs answer for every candidate of the space.

    Measured rows are as measured, so `find`, `rows`, `best` and `regret` speak of these only; other
    candidates are predicted by `models`, metric to function of codes. Every such metric is said to
    be "predicted". `held_out` is each model's error; exact counts have none.
    """

    models: Mapping[str, Model] = field(default_factory=dict)
    held_out: Mapping[str, HeldOut] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        lacking = sorted(set(self.columns) - set(self.models))
        if lacking:
            raise DataError(f"{self.name}: every column needs a model, {lacking[0]!r} has none")

    def _look(self, names: Sequence[str]) -> Callable[[Codes], Metrics]:
        about = self._described(names)
        chosen = {m.name: (self.columns[m.name], self.models[m.name]) for m in about}
        return Answers(self.lookup, chosen, about)


@dataclass(frozen=True)
class Answers:
    """Columns as a function of codes: what was measured, else what the model says."""

    lookup: Lookup
    columns: Mapping[str, tuple[Array, Model]]
    about: Sequence[Metric]

    def __call__(self, codes: Codes) -> Metrics:
        found = self.lookup.find(codes)
        absent = np.flatnonzero(found < 0)
        out = {}
        for name, (column, model) in self.columns.items():
            values = column[found]
            # a row may lack one metric and have others
            gaps = np.union1d(absent, np.flatnonzero(np.isnan(values)))
            if len(gaps):
                values[gaps] = model(codes[gaps])
            out[name] = values
        return Metrics(out, self.about)


@dataclass(frozen=True)
class LogLinear:
    """The logarithm of a metric as a linear function of features."""

    features: Callable[[Codes], Array]
    mean: Array
    scale: Array
    weights: Array
    base: float

    def __call__(self, codes: Codes) -> Array:
        scaled = (self.features(codes) - self.mean) / self.scale
        # each row summed on its own: a prediction does not hang on what else is in the batch
        return np.asarray(np.exp(np.einsum("nk,k->n", scaled, self.weights) + self.base))


def fit(
    features: Callable[[Codes], Array],
    codes: Codes,
    values: Mapping[str, Array],
    penalty: float = 1.0,
    held_out: float = 0.2,
    seed: int = 0,
) -> tuple[dict[str, LogLinear], dict[str, HeldOut]]:
    """A model of each metric by ridge regression on its logarithm, and its error on held-out rows.

    The error is that of a fit on the other rows; the model returned is fitted on all. Rows where a
    metric is NaN are left out of its fit. Values are above 0.
    """
    x = features(codes)
    mean, scale = x.mean(axis=0), x.std(axis=0)
    scale = np.where(scale > 1e-12, scale, 1.0)
    x = (x - mean) / scale
    order = np.random.default_rng(seed).permutation(len(codes))
    out = np.zeros(len(codes), dtype=np.bool_)
    out[order[: round(held_out * len(codes))]] = True
    models, errors = {}, {}
    for known, names in _alike(values).items():
        mask = np.frombuffer(known, dtype=np.bool_)
        logs = np.log(np.stack([values[name][mask] for name in names], axis=1))
        inner, outer = x[mask & ~out], x[mask & out]
        weights, base = _ridge(inner, logs[~out[mask]], penalty)
        predicted, actual = np.exp(outer @ weights + base), np.exp(logs[out[mask]])
        weights, base = _ridge(x[mask], logs, penalty)
        for j, name in enumerate(names):
            errors[name] = _error(predicted[:, j], actual[:, j])
            column = np.ascontiguousarray(weights[:, j])
            models[name] = LogLinear(features, mean, scale, column, float(base[j]))
    return models, errors


def _alike(values: Mapping[str, Array]) -> dict[bytes, list[str]]:
    """Metrics by where they are known: these share one factorisation."""
    out: dict[bytes, list[str]] = {}
    for name, column in values.items():
        out.setdefault((~np.isnan(column)).tobytes(), []).append(name)
    return out


def _ridge(x: Array, y: Array, penalty: float) -> tuple[Array, Array]:
    """Weights `(k, m)` and intercepts `(m,)`."""
    middle, base = x.mean(axis=0), y.mean(axis=0)
    centred = x - middle
    normal = centred.T @ centred + penalty * np.eye(x.shape[1])
    weights: Array = np.linalg.solve(normal, centred.T @ (y - base))
    return weights, np.asarray(base - middle @ weights)


def _error(predicted: Array, actual: Array) -> HeldOut:
    from scipy.stats import spearmanr

    left = ((actual - predicted) ** 2).sum() / ((actual - actual.mean()) ** 2).sum()
    relative = float(np.median(np.abs(predicted - actual) / actual))
    ranks = float(spearmanr(predicted, actual).statistic)
    return HeldOut(float(1 - left), ranks, relative, len(actual))
