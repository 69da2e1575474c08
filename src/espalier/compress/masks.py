"""Masks on weights: which entries a mask multiplies, and what the gradient of a mask is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from espalier.errors import EspalierError


@dataclass(frozen=True)
class Place:
    """A weight that a mask multiplies, by its name in the model.

    `index` broadcasts to the weight and says which unit each entry reads, -1 for none of this group;
    without it the mask has an entry for each of the weight's, in order.
    """

    parameter: str
    index: Tensor | None = None


@dataclass(frozen=True)
class Bilinear:
    """A mask `(units,)` whose gradient knows that the weights answer to it (BiP, Zhang et al., 2022).

    Weights w that minimise loss(m w) + curvature/2 |w|^2 move when m does. As m and w meet only in
    z = m w, the gradient for m is (w - m g / curvature) g with g that of z: first-order terms only.
    """

    weights: Tensor
    curvature: float = 1.0

    def __post_init__(self) -> None:
        if not self.curvature > 0:
            raise EspalierError(f"the curvature must be above 0, got {self.curvature!r}")


Mask = Tensor | Bilinear


def masked_weight(weight: Tensor, mask: Mask, index: Tensor | None) -> Tensor:
    """A weight times the mask of what each of its entries reads."""
    found = values(mask)
    if index is None:
        spread = found.reshape(weight.shape)
    else:
        spread = torch.cat([found, found.new_ones(1)])[index.to(found.device)]
    if isinstance(mask, Bilinear):
        return _Bilinear.apply(weight, spread.expand_as(weight), mask.curvature)  # type: ignore[no-untyped-call,no-any-return]
    return weight * spread


class _Bilinear(torch.autograd.Function):
    """w m, with the gradient of a mask whose weights follow it."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, curvature: float) -> Tensor:
        ctx.save_for_backward(weight, mask)
        ctx.curvature = curvature
        return weight * mask

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (g,) = grads
        weight, mask = ctx.saved_tensors
        return g * mask, (weight - mask * g / ctx.curvature) * g, None


def values(mask: Any) -> Tensor:
    """The numbers `(units,)` of a mask."""
    found: Tensor = mask if isinstance(mask, Tensor) else mask.weights
    return found
