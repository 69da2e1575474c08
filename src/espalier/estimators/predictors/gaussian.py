"""A Gaussian process with a kernel a block of features, in plain NumPy.

Additive kernels: Duvenaud, Nickisch & Rasmussen, 2011; length scales by marginal likelihood:
Rasmussen & Williams, 2006. Blocks such as one-hot, paths and costs get their own weight and length
scale, each held near 1 by a prior, because ten rows determine none of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import lapack, solve_triangular
from scipy.optimize import minimize

from espalier.errors import DataError
from espalier.estimators.predictors.regressor import Array, Belief, Regressor, checked

_JITTER = 1e-6
_CONSTANT = 1.0  # variance of the unknown mean, in units of the values' own
_LINEAR = 0.3  # where the prior of the weight of a linear kernel is centred
_FARTHEST = 20.0  # of a logarithm from 0
_SPREAD = (1.5, 0.8, 1.0)  # of the priors: logarithms of weights, length scales, noise


@dataclass
class Gaussian(Regressor):
    """Sum over blocks of weight x Matern-5/2 kernel, a constant, and noise.

    - `widths`: columns of each block of features; empty: one block.
    - `linear`: the blocks whose kernel is linear instead: what they add goes on beyond the rows
      known, as that of a cost does. Their columns should have a mean of about 0.
    - `noise`: where the prior of the noise is centred, as a share of the values' variance.
    - `steps`: of L-BFGS, on at most `fitted` rows; every fit starts from the one before.
    - `rows`: at most so many rows are used to predict: the highest third, and others evenly.
    """

    widths: tuple[int, ...] = ()
    linear: tuple[int, ...] = ()
    noise: float = 0.05
    steps: int = 15
    fitted: int = 160
    rows: int = 1000
    name: ClassVar[str] = "gaussian"
    growth: ClassVar[float] = 1.25

    def __post_init__(self) -> None:
        self.widths, self.linear = tuple(self.widths), tuple(self.linear)
        self._parameters: Array | None = None  # logarithms: weights, length scales, noise
        self._scales: Array = np.ones(0)  # a block: root mean squared distance of two rows
        self._x, self._y = np.zeros((0, 0)), np.zeros(0)
        self._rows: list[Array] = []  # the blocks of x, scaled
        self._shift, self._unit = 0.0, 1.0
        self._factor: Array = np.zeros((0, 0))
        self._weights: Array = np.zeros(0)

    # --- learning -------------------------------------------------------------------------------

    def fit(self, x: Array, y: Array, seed: int = 0) -> None:
        """Finds weights, length scales and noise by marginal likelihood, then `update`."""
        x, y = checked(x, y)
        use = _some(y, self.fitted)
        x0, y0 = x[use], _standard(y)[0][use]
        self._scales = np.array([_scale(block) for block in self._blocks(x0)])
        start, spread = self._prior()
        scaled = [b / s for b, s in zip(self._blocks(x0), self._scales, strict=True)]
        bases = [b @ b.T if i in self.linear else _radii(b, b) for i, b in enumerate(scaled)]
        found = minimize(
            _negative_log_posterior,
            start if self._parameters is None else self._parameters,
            args=(bases, self.linear, y0, start, spread),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": self.steps},
        )
        self._parameters = np.asarray(found.x, dtype=np.float64)
        self.update(x, y)

    def update(self, x: Array, y: Array) -> None:
        """Takes all rows with the length scales there are."""
        if self._parameters is None:
            raise DataError("a Gaussian process is fitted before it is updated: call fit")
        x, y = checked(x, y)
        use = _some(y, self.rows)
        z, self._shift, self._unit = _standard(y)
        self._x, self._y = x[use], y[use]
        self._rows = self._scaled(self._x)
        kernel = self._kernel(self._rows, self._rows)
        kernel[np.diag_indices(len(kernel))] += np.exp(self._parameters[-1]) + _JITTER
        self._factor = np.asarray(np.linalg.cholesky(kernel))
        self._weights = solve_triangular(self._factor, z[use], lower=True, check_finite=False)

    def _prior(self) -> tuple[Array, Array]:
        count = len(self._scales)
        weights, lengths = np.full(count, -np.log(count)), np.zeros(count)
        weights[list(self.linear)] = np.log(_LINEAR)
        start = np.concatenate([weights, lengths, [np.log(self.noise)]])
        return start, np.repeat(_SPREAD, (count, count, 1))

    # --- predicting -----------------------------------------------------------------------------

    def predict(self, x: Array) -> tuple[Array, Array]:
        """Means and standard deviations `(n,)`, noise included."""
        belief = self.believe(x)
        assert self._parameters is not None
        noise = np.exp(self._parameters[-1]) * self._unit**2
        return belief.mean, np.sqrt(belief.std**2 + noise)

    def believe(self, x: Array) -> GaussianBelief:
        """The posterior without noise."""
        if self._parameters is None:
            raise DataError("a regressor is fitted before it predicts: call fit")
        x = np.ascontiguousarray(x, dtype=np.float64)
        rows = self._scaled(x)
        solved = solve_triangular(
            self._factor, self._kernel(self._rows, rows), lower=True, check_finite=False
        )
        mean = self._shift + self._unit * (self._weights @ solved)
        variance = np.maximum(self._prior_variance(rows) - (solved * solved).sum(axis=0), 1e-12)
        return GaussianBelief(mean, self._unit * np.sqrt(variance), self, rows, [solved])

    def _kernel(self, a: list[Array], b: list[Array]) -> Array:
        """The kernel of rows whose blocks are `_scaled`."""
        assert self._parameters is not None
        weights = np.exp(self._parameters[: len(self._scales)])
        out = np.full((len(a[0]), len(b[0])), _CONSTANT)
        for i, (weight, one, other) in enumerate(zip(weights, a, b, strict=True)):
            if i in self.linear:
                out += weight * (one @ other.T)
                continue
            r = _radii(one, other)
            part = np.exp(-r)
            r *= 1 + r / 3
            r += 1
            r *= weight
            part *= r
            out += part
        return out

    def _prior_variance(self, x: list[Array]) -> Array:
        """The diagonal of the kernel `(n,)`."""
        assert self._parameters is not None
        weights = np.exp(self._parameters[: len(self._scales)])
        out = np.full(len(x[0]), _CONSTANT)
        for i, (weight, one) in enumerate(zip(weights, x, strict=True)):
            out += weight * (one * one).sum(axis=1) if i in self.linear else weight
        return out

    def _scaled(self, x: Array) -> list[Array]:
        """The blocks of rows in units of their length scales; linear ones in those of the data."""
        assert self._parameters is not None
        count = len(self._scales)
        lengths = np.exp(self._parameters[count : 2 * count])
        lengths[list(self.linear)] = 1.0
        units = zip(self._blocks(x), lengths * self._scales, strict=True)
        return [block / unit for block, unit in units]

    def _blocks(self, x: Array) -> list[Array]:
        widths = self.widths or (x.shape[1],)
        if sum(widths) != x.shape[1]:
            raise DataError(f"blocks of {widths} columns need {sum(widths)}, got {x.shape[1]}")
        return np.split(x, np.cumsum(widths)[:-1], axis=1)

    # --- keeping --------------------------------------------------------------------------------

    def hint(self) -> list[float]:
        """Parameters and scales."""
        if self._parameters is None:
            return []
        return [*self._parameters.tolist(), *self._scales.tolist()]

    def resume(self, hint: list[float]) -> None:
        """The parameters and scales of an earlier fit."""
        count = (len(hint) - 1) // 3
        numbers = np.array(hint, dtype=np.float64)
        self._parameters, self._scales = numbers[: 2 * count + 1], numbers[2 * count + 1 :]

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Rows, their factor, and the parameters."""
        if self._parameters is None:
            raise DataError("a regressor is fitted before it is saved: call fit")
        return {
            "x": self._x,
            "y": self._y,
            "parameters": self._parameters,
            "scales": self._scales,
            "unit": np.array([self._shift, self._unit]),
            "factor": self._factor,
            "weights": self._weights,
        }

    def restore(self, arrays: dict[str, NDArray[Any]]) -> None:
        """Everything as it was, nothing computed again."""
        self._x, self._y = arrays["x"], arrays["y"]
        self._parameters, self._scales = arrays["parameters"], arrays["scales"]
        self._shift, self._unit = (float(v) for v in arrays["unit"])
        self._factor, self._weights = np.ascontiguousarray(arrays["factor"]), arrays["weights"]
        self._rows = self._scaled(self._x)


class GaussianBelief(Belief):
    """A posterior over rows that knows how they hang together."""

    def __init__(
        self, mean: Array, std: Array, model: Gaussian, x: list[Array], solved: list[Array]
    ) -> None:
        super().__init__(mean, std)
        self._model, self._x, self._solved = model, x, solved

    def condition(self, row: int) -> None:
        """The deviations that would be left had `row` been observed; means stay as they are.

        Chooses batches as GP-BUCB does (Desautels, Krause & Burdick, 2014).
        """
        model = self._model
        assert model._parameters is not None
        shared = model._kernel([b[row : row + 1] for b in self._x], self._x)[0]
        for part in self._solved:
            shared -= part[:, row] @ part
        noise = float(np.exp(model._parameters[-1]))
        step = shared / np.sqrt(max(float(shared[row]), 0.0) + noise + _JITTER)
        self._solved.append(step[None])
        left = (self.std / model._unit) ** 2 - step**2
        self.std = model._unit * np.sqrt(np.maximum(left, 1e-12))


def _negative_log_posterior(
    p: Array, bases: list[Array], linear: tuple[int, ...], y: Array, centre: Array, spread: Array
) -> tuple[float, Array]:
    """Its value and gradient at the logarithms `p` of weights, length scales and noise.

    `bases` are radii of rows, or inner products where a block is linear.
    """
    count, n = len(bases), len(y)
    if np.abs(p).max() > _FARTHEST:  # a line search that leaps
        return 1e10, np.zeros_like(p)
    weights, lengths, noise = np.exp(p[:count]), np.exp(p[count:-1]), np.exp(p[-1])
    kernel = np.full((n, n), _CONSTANT)
    slopes: list[Array | None] = [None] * (2 * count)
    for i, (weight, length, base) in enumerate(zip(weights, lengths, bases, strict=True)):
        if i in linear:
            slopes[i] = part = weight * base
        else:
            r = base / length
            e = weight * np.exp(-r)
            slopes[i] = part = e * (1 + r * (1 + r / 3))
            slopes[count + i] = e * (r * r * (1 + r) / 3)
        kernel += part
    kernel[np.diag_indices(n)] += noise + _JITTER
    factor, bad = lapack.dpotrf(kernel, lower=1)
    if bad:
        return 1e10, np.zeros_like(p)
    inverse = lapack.dpotri(factor, lower=1)[0]
    inverse = np.tril(inverse) + np.tril(inverse, -1).T
    solved = inverse @ y
    outer = inverse - np.outer(solved, solved)
    gradient = np.array([0.0 if s is None else 0.5 * np.vdot(outer, s) for s in slopes])
    gradient = np.append(gradient, 0.5 * noise * np.trace(outer))
    z = (p - centre) / spread
    value = 0.5 * (y @ solved) + np.log(np.diag(factor)).sum() + 0.5 * (z @ z)
    return float(value), gradient + z / spread


def _radii(a: Array, b: Array) -> Array:
    """sqrt(5) times the distances of rows; in place, for it is half of a search's time."""
    out = a @ (-10.0 * b.T)
    out += 5.0 * np.einsum("ij,ij->i", a, a)[:, None]
    out += 5.0 * np.einsum("ij,ij->i", b, b)[None]
    np.maximum(out, 0.0, out=out)
    return np.asarray(np.sqrt(out, out=out))


def _scale(block: Array) -> float:
    """The root mean squared distance of two rows; 1 where all rows are equal."""
    return float(np.sqrt(2 * block.var(axis=0).sum())) or 1.0


def _standard(y: Array) -> tuple[Array, float, float]:
    """Values with mean 0 and deviation 1, their mean, their deviation (1 where all are equal)."""
    shift, unit = float(y.mean()), float(y.std()) or 1.0
    return (y - shift) / unit, shift, unit


def _some(y: Array, count: int) -> NDArray[np.int64]:
    """At most `count` rows, rising: the highest third of them, and the others evenly in age."""
    n = len(y)
    if n <= count:
        return np.arange(n)
    order = np.argsort(-y, kind="stable")
    top = order[: count // 3]
    rest = np.sort(order[count // 3 :])
    even = rest[np.linspace(0, len(rest) - 1, count - len(top)).round().astype(np.int64)]
    return np.sort(np.concatenate([top, even]))
