"""The estimator made of a regressor: learns a metric from rows, predicts it for others."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from espalier.errors import DataError, EspalierError
from espalier.estimators.estimator import Estimator
from espalier.estimators.predictors import make_regressor
from espalier.estimators.predictors.features import Arranged, FeatureMap, blocked, blocks_of
from espalier.estimators.predictors.regressor import Array, Regressor
from espalier.problem import Metric, Metrics
from espalier.space import Candidate, Space

Codes = NDArray[Any]

_FORMAT, _VERSION = "espalier predictor", 1
_SETTINGS, _ARRAYS = "predictor.json", "predictor.safetensors"


class Trials(Protocol):
    """What `fit_study` needs of a study."""

    def trials(self, phase: str | None = None) -> Sequence[Any]:
        """Trials with `state`, `candidate` and `metrics`."""


class Predictor(Estimator):
    """Predicts `metric` of a space's candidates after `fit` or `fit_study`.

    - `metric`: its `Metric`, or its name (then it is to be maximised).
    - `features`: codes `(n, d)` to numbers `(n, k)`; by default the space's own (`OneHot`). For
      "gaussian" those without blocks are `Arranged`.
    - `regressor`: a name of `REGRESSORS`, or a `Regressor`.

    Errors: `DataError` for rows that can't be learnt from, and where nothing was learnt yet.
    """

    def __init__(
        self,
        space: Space,
        metric: str | Metric,
        features: FeatureMap | None = None,
        regressor: str | Regressor = "gaussian",
    ) -> None:
        self.space = space
        about = Metric(metric, goal="max") if isinstance(metric, str) else metric
        self.metric = Metric(about.name, about.unit, about.goal, "predicted", about.split)
        self.metrics = (self.metric,)
        self._default = features is None
        if features is None or regressor == "gaussian":
            features = blocked(features, space)
        self.features: FeatureMap = features
        if isinstance(regressor, str):
            blocks = blocks_of(self.features) if regressor == "gaussian" else {}
            regressor = make_regressor(regressor, **blocks)
        self.regressor: Regressor = regressor
        self.rows = 0  # that it has learnt from

    # --- learning -------------------------------------------------------------------------------

    def fit(self, codes: Codes, values: Any, seed: int = 0) -> Self:
        """Learns from codes `(n, d)` with values `(n,)`; rows with NaN are left out."""
        values = np.asarray(values, dtype=np.float64).reshape(-1)
        if len(values) != len(codes):
            raise DataError(f"a value a row: got {len(codes)} rows and {len(values)} values")
        known = np.isfinite(values)
        if not known.any():
            raise DataError(f"no row has a {self.metric.name} to learn from")
        self.regressor.fit(self._numbers(np.asarray(codes)[known]), values[known], seed)
        self.rows = int(known.sum())
        return self

    def fit_study(self, study: Trials, phase: str | None = None, seed: int = 0) -> Self:
        """Learns from the trials of a study that are done and have the metric."""
        name = self.metric.name
        done = [t for t in study.trials(phase) if t.state == "done" and name in t.metrics]
        if not done:
            where = "the study" if phase is None else f"phase {phase!r}"
            raise DataError(f"{where} has no finished trial with {name!r}: let it run first")
        codes = self.space.encode([t.candidate for t in done])
        return self.fit(codes, [t.metrics[name].value for t in done], seed)

    # --- predicting -----------------------------------------------------------------------------

    def predict(self, codes: Codes) -> tuple[Array, Array]:
        """Means and standard deviations `(n,)` for codes `(n, d)`, all rows at once."""
        if self.rows == 0:
            raise DataError("this predictor knows no data yet: call fit or fit_study first")
        return self.regressor.predict(self._numbers(codes))

    def estimate(self, candidates: Sequence[Candidate]) -> Metrics:
        """The predicted mean with its deviation as spread.

        Each row is predicted alone: in a batch, sums are taken in another order, and the last bits
        would hang on who else is in it.
        """
        codes = self.space.encode(candidates)
        found = [self.predict(codes[i : i + 1]) for i in range(len(codes))]
        mean = np.array([m[0] for m, _ in found], dtype=np.float64)
        return self._columns(mean, np.array([s[0] for _, s in found], dtype=np.float64))

    def estimate_codes(self, codes: Codes) -> Metrics:
        """As `estimate` but for the last bits, for many codes `(n, d)` at once."""
        return self._columns(*self.predict(codes))

    def _columns(self, mean: Array, std: Array) -> Metrics:
        name = self.metric.name
        return Metrics({name: mean}, self.metrics, {name: std})

    def _numbers(self, codes: Codes) -> Array:
        return np.ascontiguousarray(self.features(codes), dtype=np.float64)

    # --- keeping --------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Writes `predictor.json` and `predictor.safetensors` into `folder`."""
        from safetensors.numpy import save_file

        if self.rows == 0:
            raise DataError("this predictor knows no data yet: call fit or fit_study first")
        folder = Path(folder)
        arrays = {k: np.ascontiguousarray(v) for k, v in self.regressor.arrays().items()}
        settings = {k: v for k, v in self.regressor.settings().items() if k != "name"}
        about = {
            "format": _FORMAT,
            "version": _VERSION,
            "space": self.space.to_json(),
            "metric": {k: getattr(self.metric, k) for k in ("name", "unit", "goal", "split")},
            "features": "one-hot" if self._default else "own",
            "arranged": isinstance(self.features, Arranged),
            "columns": int(self._numbers(self._probe()).shape[1]),
            "regressor": {"name": self.regressor.name, "settings": settings},
            "rows": self.rows,
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(arrays, folder / _ARRAYS)
            (folder / _SETTINGS).write_text(json.dumps(about, indent=2) + "\n")
        except OSError as error:
            raise DataError(
                f"can't write to {str(folder)!r} ({error}): choose another folder"
            ) from error

    @classmethod
    def load(
        cls,
        folder: str | Path,
        features: FeatureMap | None = None,
        regressor: Callable[[], Regressor] | None = None,
    ) -> Predictor:
        """The predictor that `save` wrote; predicts the same.

        Features and regressors of your own are code, and code is not saved: give the same again.
        Errors: `DataError` for another file, and for features that do not fit.
        """
        about, arrays = _read(Path(folder))
        own = about["features"] != "one-hot"
        if own and features is None:
            raise DataError("this predictor was fitted on features of its own: give features=")
        try:
            made = regressor() if regressor is not None else _made(about["regressor"])
        except EspalierError as error:
            raise DataError(f"{error}: give regressor=, a function that makes one") from error
        space = Space.from_json(about["space"])
        if about["arranged"] and features is not None:
            features = blocked(features, space)
        out = cls(space, Metric(**about["metric"]), features if own else None, made)
        columns = out._numbers(out._probe()).shape[1]
        if columns != about["columns"]:
            raise DataError(
                f"the features have {columns} columns, the saved predictor {about['columns']}: "
                "give the features that it was fitted on"
            )
        out.regressor.restore(arrays)
        out.rows = int(about["rows"])
        return out

    def _probe(self) -> Codes:
        """One row, to see what features it has."""
        return self.space.sample(1, np.random.default_rng(0))


def _made(about: dict[str, Any]) -> Regressor:
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in about["settings"].items()}
    return make_regressor(about["name"], **settings)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        about = json.loads((folder / _SETTINGS).read_text())
        if about.get("format") != _FORMAT or about.get("version") != _VERSION:
            raise ValueError(f"format is {about.get('format')!r} {about.get('version')!r}")
        return about, load_file(folder / _ARRAYS)
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        raise DataError(
            f"{str(folder)!r} holds no predictor that can be read ({error}): save it anew"
        ) from error
