"""Cutting a module's own tensors, and the numbers that the module keeps about their shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Rows = dict[str, dict[int, Tensor]]  # attribute -> dim -> rows that go


def narrow(module: nn.Module, gone: Rows, shared: dict[int, Tensor] | None = None) -> None:
    """Drop rows of a module's own parameters and buffers, in place; its numbers follow.

    `shared` (id of the tensor before -> the tensor after) keeps tensors shared among modules.
    """
    if not gone:
        return
    before = {name: tuple(getattr(module, name).shape) for name in gone}
    for name, dims in gone.items():
        old = getattr(module, name)
        new = None if shared is None else shared.get(id(old))
        if new is None:
            new = _without(old, dims)
            if shared is not None:
                shared[id(old)] = new
                shared[id(new)] = new  # met again by another path to the same module
        kind = module._parameters if name in module._parameters else module._buffers
        kind[name] = new  # type: ignore[assignment]
    for types, resize in _RESIZE.items():
        if isinstance(module, types):
            resize(module)
            return
    _resize_other(module, before)


def _without(tensor: Tensor, dims: dict[int, Tensor]) -> Tensor:
    data = tensor.detach()
    for dim, rows in dims.items():
        stay = torch.ones(tensor.shape[dim], dtype=torch.bool)
        stay[rows] = False
        data = data.index_select(dim, stay.nonzero().flatten().to(data.device))
    data = data.contiguous()
    return nn.Parameter(data, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data


# numbers of these names, as torch's own layers have them, are sizes of the module's tensors
_COUNTS = ("in_features", "out_features", "in_channels", "out_channels", "num_features",
           "num_channels", "num_parameters", "embedding_dim")  # fmt: skip


def _conv(m: nn.Module) -> None:
    assert isinstance(m, nn.modules.conv._ConvNd)
    shape = m.weight.shape
    if m.transposed:
        m.in_channels, m.out_channels = shape[0], shape[1] * m.groups
    elif m.groups > 1 and m.groups == m.in_channels:
        times = m.out_channels // m.in_channels
        m.out_channels, m.in_channels, m.groups = shape[0], shape[0] // times, shape[0] // times
    else:
        m.out_channels, m.in_channels = shape[0], shape[1] * m.groups


def _linear(m: nn.Module) -> None:
    assert isinstance(m, nn.Linear)
    m.out_features, m.in_features = m.weight.shape


def _batch_norm(m: nn.Module) -> None:
    assert isinstance(m, nn.modules.batchnorm._NormBase)
    known = m.weight if m.weight is not None else m.running_mean
    m.num_features = len(known) if known is not None else m.num_features


def _group_norm(m: nn.Module) -> None:
    assert isinstance(m, nn.GroupNorm)
    if m.num_groups == m.num_channels:
        m.num_groups = len(m.weight)
    m.num_channels = len(m.weight)


def _layer_norm(m: nn.Module) -> None:
    assert isinstance(m, (nn.LayerNorm, nn.RMSNorm))
    m.normalized_shape = tuple(m.weight.shape)


def _embedding(m: nn.Module) -> None:
    assert isinstance(m, nn.Embedding)
    m.embedding_dim = m.weight.shape[1]


def _prelu(m: nn.Module) -> None:
    assert isinstance(m, nn.PReLU)
    m.num_parameters = len(m.weight)


_RESIZE: dict[type[nn.Module] | tuple[type[nn.Module], ...], Callable[[nn.Module], None]] = {
    nn.modules.conv._ConvNd: _conv,
    nn.Linear: _linear,
    nn.modules.batchnorm._NormBase: _batch_norm,
    nn.GroupNorm: _group_norm,
    (nn.LayerNorm, nn.RMSNorm): _layer_norm,
    nn.Embedding: _embedding,
    nn.PReLU: _prelu,
}


def _resize_other(module: nn.Module, before: dict[str, tuple[int, ...]]) -> None:
    """A module of the user's: shapes, and numbers of torch's names, of a dim that was cut."""
    transposed = _transposed(module)
    if transposed is not None:
        module.nx, module.nf = transposed.shape  # type: ignore[assignment]
        return
    changed: dict[int, set[int]] = {}
    for name, shape in before.items():
        for old, new in zip(shape, getattr(module, name).shape, strict=True):
            changed.setdefault(old, set()).add(new)
    for name, value in list(vars(module).items()):
        size = _size(value)
        if len(changed.get(size, ())) != 1 or (type(value) is int and name not in _COUNTS):
            continue
        new = next(iter(changed[size]))
        if isinstance(value, (tuple, list)):
            setattr(module, name, type(value)(new if n == size else n for n in value))
        else:
            setattr(module, name, new)


def unsure(module: nn.Module) -> dict[str, int]:
    """A module's numbers above 1 that `narrow` leaves alone: each may be the size of a dim, or as
    large by chance, as a longest input."""
    if isinstance(module, tuple(_RESIZE)) or _transposed(module) is not None:
        return {}
    numbers = {name: value for name, value in vars(module).items() if type(value) is int}
    return {name: value for name, value in numbers.items() if value > 1 and name not in _COUNTS}


def _transposed(module: nn.Module) -> Tensor | None:
    """The weight of GPT-2's transposed linear layer."""
    weight = module._parameters.get("weight")
    found = weight is not None and weight.dim() == 2 and {"nx", "nf"} <= set(vars(module))
    return weight if found else None


def _size(value: Any) -> int:
    """A number, or the one other than 1 of a shape, as a normalized_shape; 0 where it is neither."""
    numbers = value if type(value) in (tuple, list) else [value]
    if not all(type(n) is int for n in numbers):
        return 0
    wide = [n for n in numbers if n != 1]
    return wide[0] if len(wide) == 1 else 0
