"""A model in which every branch can be seen: scales that hide what is behind them are drawn anew.

What belongs together does not hang on weights, but whether numbers show that it does: behind a
layer scale of 1e-6, or a norm that begins at 0, a branch that is cut wrongly changes nothing.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

_HIDDEN = 1e-3  # scales of at most this hide a branch from a check in float32


def seen(model: nn.Module) -> nn.Module:
    """The model, or a copy with other scales where some are all alike or close to 0; the copy
    shares its other weights with the model."""
    dull = {id(p): p for name, p in model.named_parameters() if _dull(name, p)}
    if not dull:
        return model
    rest = {id(p): p for p in model.parameters() if id(p) not in dull}
    twin = copy.deepcopy(model, dict(rest))
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in twin.parameters():
            if id(p) not in rest:
                p.copy_(torch.rand(p.shape, generator=rng) + 0.5)
    return twin


def _dull(name: str, p: Tensor) -> bool:
    """Whether it is a scale of channels as it was made: no bias, which hides nothing."""
    scale = p.is_floating_point() and p.numel() == max(p.shape, default=0) > 1
    if not scale or name.rpartition(".")[2].endswith("bias"):
        return False
    low, high = (float(x) for x in p.detach().aminmax())
    return low == high or max(abs(low), abs(high)) <= _HIDDEN
