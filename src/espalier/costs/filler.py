"""Times of pieces that were not measured, from the work they ask for and those that were.

Regressions; cross-validation on the measured pieces chooses. All give one positive number
for one piece, whatever else is asked, so that a prediction never hangs on its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Model = Callable[[Array], float]

_SMALLEST = 1e-6  # ms


def linear(work: Array, ms: Array) -> Model:
    """Time as a sum of work, each kind at a price that is not negative; least relative squares."""
    from scipy.optimize import nnls

    columns = np.column_stack([np.ones(len(work)), work])
    unit = columns.max(axis=0) + 1e-12
    prices = nnls(columns / unit / ms[:, None], np.ones(len(ms)))[0] / unit

    def predict(one: Array) -> float:
        return max(float(np.append(1.0, one) @ prices), _SMALLEST)

    return predict


def trees(work: Array, ms: Array) -> Model:
    """`linear`, corrected by boosted trees on the logarithm of what it misses (Friedman, 2001)."""
    from sklearn.ensemble import GradientBoostingRegressor

    base = linear(work, ms)
    missed = np.log(ms / np.array([base(row) for row in work]))
    model = GradientBoostingRegressor(
        n_estimators=150, max_depth=4, learning_rate=0.05, subsample=0.7, random_state=0
    ).fit(np.log1p(work), missed)

    def predict(one: Array) -> float:
        return base(one) * float(np.exp(model.predict(np.log1p(one)[None])[0]))

    return predict


def process(work: Array, ms: Array) -> Model:
    """Log time as a Gaussian process over log work (Rasmussen and Williams, 2006)."""
    return _process(work, np.log(ms), lambda one: 1.0, centred=True)


def linear_and_process(work: Array, ms: Array) -> Model:
    """`linear`, corrected by a Gaussian process on the logarithm of what it misses: near pieces that
    were measured their word counts, far from all of them the price of the work."""
    base = linear(work, ms)
    missed = np.log(ms / np.array([base(row) for row in work]))
    return _process(work, missed, base, centred=False)


def _process(work: Array, y: Array, base: Model, centred: bool) -> Model:
    """`base` times the exponential of a Gaussian process of `y` over log work."""
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

    raw = np.log1p(work)
    centre, width = raw.mean(axis=0), raw.std(axis=0) + 1e-9
    varies = width > 1e-6
    kernel = ConstantKernel(1.0) * RBF(2.0) + WhiteKernel(1e-3)
    model = GaussianProcessRegressor(kernel, normalize_y=centred, random_state=0)

    def scaled(rows: Array) -> Array:
        out: Array = ((np.log1p(rows) - centre) / width)[..., varies]
        return out

    model.fit(scaled(work), y)

    def predict(one: Array) -> float:
        return base(one) * float(np.exp(model.predict(scaled(one)[None])[0]))

    return predict


FILLERS: dict[str, Callable[[Array, Array], Model]] = {
    "linear": linear,
    "linear and trees": trees,
    "gaussian process": process,
    "linear and process": linear_and_process,
}
_TRIED = ("linear", "linear and trees", "linear and process")  # the other one is in older tables
_ENOUGH = 10  # measured pieces, for anything but the linear one


def choose(work: Array, ms: Array, seed: int = 0) -> tuple[str, dict[str, float]]:
    """The regression with the least error in 5-fold cross-validation, and each one's error.

    The error is the mean absolute error of the logarithm: 0.05 is about 5%.
    """
    if len(ms) < _ENOUGH:
        return "linear", {}
    folds = np.random.default_rng(seed).permutation(len(ms)) % 5
    errors = {name: _error(FILLERS[name], work, ms, folds) for name in _TRIED}
    return min(errors, key=errors.__getitem__), errors


def _error(
    fit: Callable[[Array, Array], Model], work: Array, ms: Array, folds: NDArray[np.int64]
) -> float:
    missed = []
    for fold in range(5):
        held = folds == fold
        model = _quietly(fit, work[~held], ms[~held])
        missed += [
            abs(float(np.log(model(w) / t))) for w, t in zip(work[held], ms[held], strict=True)
        ]
    return float(np.mean(missed))


class Filler:
    """The milliseconds of pieces from their work, by the named regression on those measured.

    It is fitted when it is first asked; without a name it is chosen then. The same data give the
    same numbers.
    """

    def __init__(self, name: str, work: Array, ms: Array) -> None:
        self._name, self._work, self._ms = name, work, ms
        self._model: Model | None = None

    def __call__(self, work: Sequence[float] | Array) -> float:
        if self._model is None:
            name = self._name or choose(self._work, self._ms)[0]
            self._model = _quietly(FILLERS[name], self._work, self._ms)
        return self._model(np.array(work))


def _quietly(fit: Callable[[Array, Array], Model], work: Array, ms: Array) -> Model:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a kernel's width at its bound is no news to anybody
        return fit(work, ms)
