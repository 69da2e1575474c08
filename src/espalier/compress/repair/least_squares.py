"""Linear least squares from second moments: the weights of one layer, refitted in closed form.

Everything is in float64: the normal equations square the condition number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_ELEMENTS = 20_000_000  # of the matrices that are solved at once: 160 MB
_ROWS = 4096  # examples that are turned to float64 at once
_LEAST = 1e-9


@dataclass
class Moments:
    """Sums over examples of what a layer reads, `x (n, d)`, and should give, `y (n, o)`.

    `gram (d, d)` is the sum of x x', `cross (o, d)` of y x', `square (o,)` of y*y.
    """

    gram: Tensor
    cross: Tensor
    square: Tensor
    rows: int = 0

    @classmethod
    def empty(cls, inputs: int, outputs: int, device: torch.device | None = None) -> Moments:
        """Of no example yet."""
        gram, cross, square = (
            torch.zeros(*size, dtype=torch.float64, device=device)
            for size in ((inputs, inputs), (outputs, inputs), (outputs,))
        )
        return cls(gram, cross, square)

    def add(self, x: Tensor, y: Tensor) -> Moments:
        """Takes examples in; gives itself."""
        for few, aims in zip(torch.split(x, _ROWS), torch.split(y, _ROWS), strict=True):
            a, b = few.double(), aims.double()  # so of a part only: x may be most of the memory
            self.gram += a.T @ a
            self.cross += b.T @ a
            self.square += (b * b).sum(0)
        self.rows += len(x)
        return self

    def error(self, weight: Tensor) -> float:
        """Sum of squares between y and x times `weight (o, d)` transposed, over that of y."""
        w = weight.double()
        left = self.square.sum() - 2 * (w * self.cross).sum() + ((w @ self.gram) * w).sum()
        return max(float(left) / max(float(self.square.sum()), 1e-300), 0.0)


def refit(moments: Moments, start: Tensor, ridge: float, mask: Tensor | None = None) -> Tensor:
    """The weights `(o, d)` with the least squared error plus a ridge around `start (o, d)`.

    `ridge` is in units of the mean of the Gram matrix's diagonal, so that it is free of the
    inputs' scale; with one of 0, inputs that hang together would have no single answer, so it is
    1e-9 at least. Weights where `mask` is False stay what they are in `start`. Because the ridge
    is around `start`, the squared error is at most that of `start`.
    """
    w = start.double()
    d = len(moments.gram)
    scale = float(moments.gram.diagonal().mean())
    if scale <= 0:
        return w  # nothing ever comes in
    system = moments.gram + max(ridge, _LEAST) * scale * torch.eye(
        d, dtype=w.dtype, device=w.device
    )
    # what is left to explain; the step from `start` that explains it best
    rest = moments.cross - w @ moments.gram
    step = torch.empty_like(w)
    may = torch.ones_like(w, dtype=torch.bool) if mask is None else mask
    free = may.all(1)
    step[free] = torch.linalg.solve(system, rest[free].T).T
    for rows in torch.split(torch.nonzero(~free)[:, 0], max(1, _ELEMENTS // (d * d))):
        step[rows] = _masked(system, rest[rows], may[rows])
    return w + step


def _masked(system: Tensor, rest: Tensor, mask: Tensor) -> Tensor:
    """Steps of rows that may each move other weights: one small system a row, solved together."""
    free = mask.double()
    both = system * free[:, :, None] * free[:, None, :]
    both = both + torch.diag_embed(1.0 - free)  # what may not move gets the equation step = 0
    solved: Tensor = torch.linalg.solve(both, (rest * free)[:, :, None])[:, :, 0]
    return solved
