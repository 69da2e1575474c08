"""How a search fares: how sharp its minimum is, and what is lost when it becomes one network."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from espalier.train.seeds import generator

_NOISE = 15  # purpose of the random stream


def sharpness(
    loss: Callable[[], Tensor],
    weights: Sequence[nn.Parameter],
    radius: float = 0.1,
    directions: int = 5,
    seed: int = 0,
) -> dict[str, float]:
    """Mean and largest rise of a loss when the weights move by `radius` of their norm.

    `loss` gives it at the present weights. A direction is normal noise, scaled in each tensor to
    `radius` times the tensor's norm, so that layers of different scale move alike. The weights are
    put back.
    """
    saved = [w.detach().clone() for w in weights]
    lengths = [w.norm() for w in saved]
    rises = []
    with torch.no_grad():
        flat = loss()
        for index in range(directions):
            draws = generator(seed, _NOISE, index)
            for weight, value, length in zip(weights, saved, lengths, strict=True):
                noise = torch.randn(value.shape, generator=draws).to(value)
                size = noise.norm().clamp(min=1e-12)
                weight.copy_(value + noise * (radius * length / size))
            rises.append(loss() - flat)
        for weight, value in zip(weights, saved, strict=True):
            weight.copy_(value)
        every = torch.stack(rises)
        return {"mean": float(every.mean()), "max": float(every.max()), "radius": radius}
