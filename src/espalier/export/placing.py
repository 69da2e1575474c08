"""Putting one module in place of another. A model may hold a module under several names."""

from __future__ import annotations

from torch import nn


def places(model: nn.Module, module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Every holder of a module within a model, and its name there."""
    return [
        (holder, name)
        for holder in model.modules()
        for name, held in holder._modules.items()
        if held is module
    ]


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Puts a module at a path, and under every other name that the one before it had; at "" the
    model itself becomes that module."""
    if not path:
        model.__class__, model.__dict__ = type(module), module.__dict__
        return
    for holder, name in places(model, model.get_submodule(path)):
        holder._modules[name] = module
