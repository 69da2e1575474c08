"""Times of pieces that were not measured, from the work they ask for and those that were.

Three regressions; cross-validation on the measured pieces chooses. All give one positive number
for one piece, whatever else is asked, so that a prediction never hangs on its batch.
"""

from __future__ import annotations

from collections.abc import Callable

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
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

    raw = np.log1p(work)
    centre, width = raw.mean(axis=0), raw.std(axis=0) + 1e-9
    varies = width > 1e-6
    kernel = ConstantKernel(1.0) * RBF(2.0) + WhiteKernel(1e-3)
    model = GaussianProcessRegressor(kernel, normalize_y=True, random_state=0)

    def scaled(rows: Array) -> Array:
        out: Array = ((np.log1p(rows) - centre) / width)[..., varies]
        return out

    model.fit(scaled(work), np.log(ms))

    def predict(one: Array) -> float:
        return float(np.exp(model.predict(scaled(one)[None])[0]))

    return predict


FILLERS: dict[str, Callable[[Array, Array], Model]] = {
    "linear": linear,
    "linear and trees": trees,
    "gaussian process": process,
}
_ENOUGH = 25  # measured pieces, for anything but the linear one


def choose(work: Array, ms: Array, seed: int = 0) -> tuple[str, dict[str, float]]:
    """The regression with the least error in 5-fold cross-validation, and each one's error.

    The error is the mean absolute error of the logarithm: 0.05 is about 5%.
    """
    if len(ms) < _ENOUGH:
        return "linear", {}
    folds = np.random.default_rng(seed).permutation(len(ms)) % 5
    errors = {name: _error(fit, work, ms, folds) for name, fit in FILLERS.items()}
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


def fitted(name: str, work: Array, ms: Array) -> Model:
    """The named regression, fitted to the measured pieces; the same data give the same model."""
    return _quietly(FILLERS[name], work, ms)


def _quietly(fit: Callable[[Array, Array], Model], work: Array, ms: Array) -> Model:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a kernel's width at its bound is no news to anybody
        return fit(work, ms)
