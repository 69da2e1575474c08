"""Sizes under a mixture: the largest that runs, and a mask that says how much of each channel.

Channel masks are those of FBNetV2 (Wan et al., 2020): layers run once at the largest size, and
channel c is multiplied by the sum of the weights of the sizes above c. Soft masks on kernels are
made in the same way, from the tap inwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from espalier.errors import SpaceError
from espalier.nets.elastic.dims import Choices, Dim, decisions, options, size
from espalier.nets.elastic.mixing import Mixed, check_batch


@dataclass(frozen=True)
class Spread:
    """A size that several options make: one size for each combination of the live ones."""

    sizes: tuple[int, ...]
    parts: tuple[Mixed, ...]  # none where no decision of the size is mixed

    @property
    def size(self) -> int:
        """The largest, which is what runs."""
        return max(self.sizes)

    @property
    def sure(self) -> bool:
        """Whether there is nothing to multiply by."""
        return all(part.sure for part in self.parts)

    @property
    def per_sample(self) -> bool:
        """Whether each sample has sizes of its own."""
        return any(part.per_sample for part in self.parts)

    def weights(self) -> Tensor:
        """The weight of each combination: `(combinations,)` or `(batch, combinations)`."""
        out: Tensor | None = None
        for part in self.parts:
            own = part.weights
            if len(part.live) < own.shape[-1]:
                own = own.index_select(-1, _indices(part.live, own.device))
            out = own if out is None else (out[..., :, None] * own[..., None, :]).flatten(-2)
        assert out is not None
        return out

    def mask(self) -> Tensor:
        """How much of each channel there is: `(size,)` or `(batch, size)`."""
        weights = self.weights()
        return weights @ _below(self.sizes, weights.device, weights.dtype)

    def masked(self, x: Tensor, dim: int) -> Tensor:
        """`x` times the mask along dimension `dim`; samples are dimension 0."""
        if self.sure:
            return x
        if len(set(self.sizes)) > 1:
            return x * aligned(self.mask(), x, dim)
        return x * aligned(self.weights().sum(-1, keepdim=True), x, dim)

    def taps(self) -> Tensor:
        """How much of each tap of a square kernel there is, `(size, size)`."""
        weights, side = self.weights(), self.size
        rings = _rings(self.sizes, weights.device, weights.dtype)
        return (weights @ rings).reshape(side, side)


def aligned(mask: Tensor, x: Tensor, dim: int) -> Tensor:
    """A mask `(n,)` or `(batch, n)` in a shape that multiplies `x` along `dim`."""
    shape = [1] * x.dim()
    shape[dim] = mask.shape[-1]
    if mask.dim() == 2:
        check_batch(len(mask), x)
        shape[0] = len(mask)
    return mask.to(x.dtype).reshape(shape)


def spread(dim: Dim, found: Mapping[str, Mixed], choices: Choices) -> Spread:
    """A size where some of its decisions are mixed, and the others are as in `choices`."""
    if isinstance(dim, int):
        return Spread((dim,), ())
    every = {d.name: options(d) for d in decisions(dim)}
    names = [name for name in every if name in found]
    parts = tuple(found[name] for name in names)
    sizes = tuple(
        size(dim, {**choices, **{n: every[n][i] for n, i in zip(names, combined, strict=True)}})
        for combined in product(*(part.live for part in parts))
    )
    return Spread(sizes, parts)


def refuse_per_sample(taken: Spread, what: str, names: Sequence[str]) -> None:
    """Refuses weights a sample where all samples share what is mixed."""
    if taken.per_sample:
        raise SpaceError(
            f"all samples share {what}, so {', '.join(names)} takes weights of shape (options,),"
            " not (batch, options)"
        )


# What is kept between calls must not be an inference tensor: backward could not use it.


@lru_cache(maxsize=1024)
@torch.inference_mode(False)
def _indices(live: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(live, device=device)


@lru_cache(maxsize=1024)
@torch.inference_mode(False)
def _below(sizes: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """1 where a channel is below a size, `(sizes, largest)`."""
    channels = torch.arange(max(sizes))
    return (channels < torch.tensor(sizes)[:, None]).to(device, dtype)


@lru_cache(maxsize=1024)
@torch.inference_mode(False)
def _rings(sides: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """1 where a tap is inside a kernel centred in the largest, `(sides, largest**2)`."""
    away = (torch.arange(max(sides)) - max(sides) // 2).abs()
    distance = torch.maximum(away[:, None], away[None])
    return (distance.flatten() <= torch.tensor(sides)[:, None] // 2).to(device, dtype)
