"""The shape of a layer in words: what a layer without weights needs to be like one that was changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from espalier.errors import DataError


def described(layer: nn.Module) -> dict[str, Any]:
    """Shapes of a layer's tensors, and the plain numbers and words that its modules hold, as JSON."""
    return {
        "tensors": {name: list(tensor.shape) for name, tensor in layer.state_dict().items()},
        "numbers": {path: _numbers(module) for path, module in layer.named_modules()},
    }


def reshape(layer: nn.Module, shape: dict[str, Any]) -> None:
    """Makes a layer without memory for weights, in place, of the shape that `described` told.

    Errors: `DataError` where whole parts of it went: that no numbers can say.
    """
    if list(layer.state_dict()) != list(shape["tensors"]):
        raise DataError(
            "a layer that lost whole parts was written, which can't be gone on with: begin anew"
        )
    for name, size in shape["tensors"].items():
        path, _, last = name.rpartition(".")
        owner = layer.get_submodule(path)
        old = getattr(owner, last)
        if list(old.shape) == size:
            continue
        new = torch.empty(size, dtype=old.dtype, device="meta")
        held = nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new
        setattr(owner, last, held)
    for path, numbers in shape["numbers"].items():
        module = layer.get_submodule(path)
        for name, value in numbers.items():
            setattr(module, name, value)


def _numbers(module: nn.Module) -> dict[str, Any]:
    plain = (bool, int, float, str)
    return {n: v for n, v in vars(module).items() if isinstance(v, plain) and n != "training"}
