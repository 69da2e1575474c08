"""Ranges of quantised tensors, found by looking at data."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from espalier.errors import DataError
from espalier.export import deployed
from espalier.export.quantisers import LEVELS, Quantiser
from espalier.train.running import laid_out

_SAMPLE = 1 << 14  # values of a tensor and batch that are looked at
_SHARES = (1.0, 0.97, 0.94, 0.9, 0.86, 0.82, 0.78, 0.74, 0.7, 0.66, 0.62, 0.58, 0.54, 0.5)


def calibrate(network: nn.Module, inputs: Tensor, batch: int = 64) -> None:
    """Sets the ranges of a network's quantisers, in place, from what they see on `inputs` `(n, ...)`.

    Of some ranges that clip more and more, each takes the one of least squared error. To be called
    again where the network has changed: activations' ranges do not follow by themselves.
    Errors: `DataError` for no inputs, and where a tensor is not finite.
    """
    if len(inputs) == 0:
        raise DataError("calibration needs at least one input, got none")
    found = {n: m for n, m in network.named_modules() if isinstance(m, Quantiser)}
    if not found:
        return
    inputs = laid_out(network, inputs)
    samples: dict[str, list[NDArray[np.float64]]] = {name: [] for name in found}
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    try:
        for name, quantiser in found.items():
            # sampled at once: what comes after may write over the tensor
            quantiser.look = lambda x, name=name: samples[name].append(_sample(x))
        with deployed(network):
            for part in torch.split(inputs, batch):
                network(part.to(device))
    finally:
        for quantiser in found.values():
            quantiser.look = None
    for name, quantiser in found.items():
        values = np.concatenate(samples[name]) if samples[name] else np.zeros(1)
        if not np.isfinite(values).all():
            raise DataError(f"what {name!r} rounds is not finite (NaN or infinite) on these inputs")
        quantiser.set_range(*best_range(values))


def _sample(x: Tensor) -> NDArray[np.float64]:
    """Evenly spread values, with the smallest and the largest among them."""
    flat = x.detach().reshape(-1).double()
    step = max(1, flat.numel() // _SAMPLE)
    while math.gcd(step, flat.numel()) > 1:
        step += 1  # else it could fall on the same few columns or channels again and again
    ends = torch.stack([flat.min(), flat.max()])
    return torch.cat([flat[::step], ends]).cpu().numpy()


def best_range(values: NDArray[np.float64]) -> tuple[float, float]:
    """The range, of some shares of the whole one, that loses least when `values` are rounded."""
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    if high - low <= 0:
        return 0.0, 1.0
    errors = [_error(values, low * share, high * share) for share in _SHARES]
    share = _SHARES[int(np.argmin(errors))]
    return low * share, high * share


def _error(values: NDArray[np.float64], low: float, high: float) -> float:
    scale = (high - low) / LEVELS
    rounded = np.round(np.clip(values, low, high) / scale) * scale
    return float(np.square(rounded - values).mean())
