"""Convolutions and linear layers as linear regressions: their rows, and their weights refitted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from espalier.compress.repair.least_squares import Moments, refit

KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d)  # what can be written as such rows


@dataclass(frozen=True)
class Places:
    """Which places of a layer's output are looked at: the same in every example.

    `extent` are the output's places (its height and width, say; none for a vector), `chosen (p,)`
    indices into them, flattened.
    """

    extent: tuple[int, ...]
    chosen: Tensor

    @classmethod
    def of(cls, layer: nn.Module, out: Tensor, wanted: int, generator: torch.Generator) -> Places:
        """About `wanted` rows over all examples of an output, chosen at random."""
        extent = tuple(out.shape[1:-1] if isinstance(layer, nn.Linear) else out.shape[2:])
        count = int(torch.tensor(extent).prod()) if extent else 1
        each = min(count, -(-wanted // max(len(out), 1)))
        order = torch.randperm(count, generator=generator)[:each].sort().values
        return cls(extent, order.to(out.device))


def outputs(layer: nn.Module, out: Tensor, places: Places) -> Tensor:
    """The output at the places, a row each: `(rows, channels)`."""
    if isinstance(layer, nn.Linear):
        flat = out.reshape(len(out), -1, out.shape[-1])
        return flat[:, places.chosen].reshape(-1, out.shape[-1])
    flat = out.flatten(2)[:, :, places.chosen]
    return flat.transpose(1, 2).reshape(-1, out.shape[1])


def inputs(layer: nn.Module, x: Tensor, places: Places) -> Tensor:
    """What the output at the places is made of: `(rows, groups, d)`, in the order of the weights.

    d is the length of one row of the layer's weights.
    """
    if isinstance(layer, nn.Linear):
        flat = x.reshape(len(x), -1, x.shape[-1])
        return flat[:, places.chosen].reshape(-1, 1, x.shape[-1])
    conv: Any = layer
    lifted = x[:, :, None] if x.ndim == 3 else x  # one dimension is two with a height of 1
    kernel, stride, dilation = (_two(v) for v in (conv.kernel_size, conv.stride, conv.dilation))
    lifted = _padded(conv, lifted)
    width = places.extent[-1]
    row, column = places.chosen // width, places.chosen % width
    device = x.device
    rows = row[:, None] * stride[0] + torch.arange(kernel[0], device=device) * dilation[0]
    columns = column[:, None] * stride[1] + torch.arange(kernel[1], device=device) * dilation[1]
    found = lifted[:, :, rows[:, :, None], columns[:, None, :]]  # (n, c, p, kh, kw)
    return found.transpose(1, 2).reshape(len(x) * len(row), conv.groups, -1)


def refit_layer(layer: Any, read: Tensor, wanted: Tensor, ridge: float) -> tuple[float, float]:
    """Refits a layer in place; gives the relative squared error before and after.

    `read (n, groups, d)` is what it reads, `wanted (n, channels)` what it should give. Weights that
    are exactly 0 stay so where the layer is sparse; the rest is never made worse.
    """
    groups = read.shape[1]
    weight = layer.weight.detach().flatten(1)
    start = weight if layer.bias is None else torch.cat([weight, layer.bias[:, None]], dim=1)
    mask = start != 0
    mask[:, weight.shape[1] :] = True  # the bias may move
    sparse = not bool(mask.all())
    parts, errors = [], []
    for g, rows in enumerate(start.chunk(groups)):
        low = g * len(rows)
        x = read[:, g]
        if layer.bias is not None:
            x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        moments = Moments.empty(x.shape[1], len(rows), x.device)
        moments.add(x, wanted[:, low : low + len(rows)])
        own = mask[low : low + len(rows)] if sparse else None
        found = refit(moments, rows, ridge, own).to(rows.dtype)
        size = float(moments.square.sum())
        old, new = (moments.error(w) * size for w in (rows, found))
        keep = not (bool(torch.isfinite(found).all()) and new <= old)
        parts.append(rows if keep else found)
        errors.append((old, old if keep else new, size))
    whole = torch.cat(parts)
    with torch.no_grad():
        layer.weight.copy_(whole[:, : weight.shape[1]].view_as(layer.weight))
        if layer.bias is not None:
            layer.bias.copy_(whole[:, -1])
    total = max(sum(size for _, _, size in errors), 1e-300)
    return sum(old for old, _, _ in errors) / total, sum(new for _, new, _ in errors) / total


def _two(value: tuple[int, ...]) -> tuple[int, int]:
    return (1, value[0]) if len(value) == 1 else (value[0], value[1])


def _padded(conv: Any, x: Tensor) -> Tensor:
    """The input with the layer's own padding, as the layer itself pads it."""
    sides = list(conv._reversed_padding_repeated_twice)
    mode = conv.padding_mode
    if mode == "zeros":
        return functional.pad(x, sides)
    if len(sides) == 2:
        return functional.pad(x[:, :, 0], sides, mode=mode)[:, :, None]
    return functional.pad(x, sides, mode=mode)
