"""Kernel densities over rows of codes: how likely a row is among the good, and draws near them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.space import Categorical, Real, Space

Codes = NDArray[Any]
Array = NDArray[np.float64]

_GRID = 64  # a decision of more options, or a real one, is looked at on a grid of as many points
_NARROWEST = 1e-3  # of the range: a decision on which all rows agree keeps a little spread
_WIDER = 3.0  # how much wider kernels are for drawing than for judging


class Density:
    """A product of kernels around each of n rows `(n, d)`: with several rows, their mean.

    Widths by the normal reference rule, 1.06 s n^(-1 / (4 + d)) with s the spread of the decision
    (Silverman, 1986); a normal kernel over the options of an ordered decision, and over a
    categorical one a share spread evenly over its other options (Aitchison & Aitken, 1976). An
    inactive decision counts as its first option.
    """

    def __init__(self, space: Space, codes: Codes) -> None:
        self.space = space
        self.points = self._cells(codes)
        scale = 1.06 * len(codes) ** (-1 / (4 + len(space)))
        self._judge, self._draw = [], []
        for j, decision in enumerate(space.decisions):
            k = self._count(j)
            if isinstance(decision, Categorical):
                share = np.bincount(self.points[:, j], minlength=k) / len(codes)
                width = scale * float(np.sqrt(max(1 - (share**2).sum(), 0.0)))
                kernel = _even(k, max(width, _NARROWEST))
                self._judge.append(np.log(kernel))
                self._draw.append(kernel)
            else:
                spread = float(np.std(self.points[:, j] / max(k - 1, 1)))
                width = max(scale * spread, _NARROWEST)
                self._judge.append(np.log(_normal(k, width)))
                self._draw.append(_normal(k, width * _WIDER))

    def log(self, codes: Codes) -> Array:
        """The logarithm of the density `(m,)` at rows, up to a constant."""
        cells = self._cells(codes)
        each = np.zeros((len(self.points), len(cells)))
        for j, kernel in enumerate(self._judge):
            each += kernel[np.ix_(self.points[:, j], cells[:, j])]
        most = each.max(axis=0)
        out: Array = most + np.log(np.exp(each - most).mean(axis=0))
        return out

    def draw(self, n: int, rng: np.random.Generator) -> Codes:
        """n rows near points drawn at random; they need not be valid."""
        around = self.points[rng.integers(len(self.points), size=n)]
        out = np.empty((n, len(self.space)), dtype=self.space.dtype)
        for j, kernel in enumerate(self._draw):
            edges = kernel.cumsum(axis=1)[around[:, j]]
            cell = (rng.random(n)[:, None] > edges[:, :-1]).sum(axis=1)
            out[:, j] = self._code(j, cell, rng)
        return out

    # --- options as cells of a grid -------------------------------------------------------------

    def _count(self, j: int) -> int:
        decision = self.space.decisions[j]
        listed = isinstance(decision, Categorical) or 0 < decision.count <= _GRID
        return decision.count if listed else _GRID

    def _cells(self, codes: Codes) -> NDArray[np.int64]:
        """Rows as cells `(n, d)`: the code itself, or where on the grid a number is."""
        out = np.empty(codes.shape, dtype=np.int64)
        for j, decision in enumerate(self.space.decisions):
            k = self._count(j)
            column = np.asarray(codes[:, j], dtype=float)
            if isinstance(decision, Real):
                low, high = decision.low, decision.high
                if decision.log:
                    low, high, column = np.log(low), np.log(high), np.log(column)
                column = (column - low) / (high - low) * k
            elif decision.count != k:
                column = column / decision.count * k
            out[:, j] = np.clip(np.floor(column), 0, k - 1)
        return out

    def _code(self, j: int, cell: NDArray[np.int64], rng: np.random.Generator) -> Array:
        """A code in each cell: the option, or a number drawn within."""
        decision, k = self.space.decisions[j], self._count(j)
        if isinstance(decision, Real):
            share = (cell + rng.random(len(cell))) / k
            if decision.log:
                low, high = np.log(decision.low), np.log(decision.high)
                drawn = np.exp(low + share * (high - low))
            else:
                drawn = decision.low + share * (decision.high - decision.low)
            return np.asarray(np.clip(drawn, decision.low, decision.high))
        if decision.count != k:
            share = (cell + rng.random(len(cell))) / k
            return np.asarray(np.minimum(np.floor(share * decision.count), decision.count - 1))
        codes: Array = cell.astype(np.float64)
        return codes


def _even(k: int, width: float) -> Array:
    """Kernels `(k, k)`: the own option but for a share `width`, which the others divide."""
    width = min(width, (k - 1) / k)
    out = np.full((k, k), width / max(k - 1, 1))
    np.fill_diagonal(out, 1 - width)
    return np.asarray(np.maximum(out, 1e-12))


def _normal(k: int, width: float) -> Array:
    """Kernels `(k, k)`: normal around each of k points of 0..1, made to sum to 1."""
    at = np.arange(k) / max(k - 1, 1)
    out = np.exp(-0.5 * ((at[:, None] - at) / width) ** 2) + 1e-12
    return np.asarray(out / out.sum(axis=1, keepdims=True))
