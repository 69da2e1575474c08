"""Channels in the order of their importance, so that smaller widths keep the most important ones.

Importance is the L1 norm of the weights that read a channel (Once-for-All, Cai et al., 2020).
Sort after the largest network has been trained and before its widths are shrunk.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from espalier.errors import SpaceError
from espalier.nets.elastic.attention import Attention, Parameter
from espalier.nets.elastic.convolution import Conv2d, DepthwiseConv2d
from espalier.nets.elastic.dims import Dim, decisions, options, size, text
from espalier.nets.elastic.layers import BatchNorm2d, LayerNorm, Linear
from espalier.space import Option

if TYPE_CHECKING:
    from espalier.nets.supernet import Supernet

TOLERANCE = 1e-4  # of the largest output: sums in another order differ by less


@dataclass
class _Group:
    """The tensors that share one set of channels, each with the dimension along which they are."""

    written: list[tuple[str, int]] = field(default_factory=list)  # by name in the supernet
    read: list[tuple[str, int]] = field(default_factory=list)
    block: int = 1  # channels that stay together, as those of one head


def sort_channels(
    supernet: Supernet, keep: Mapping[str, Sequence[Option]] | None = None
) -> tuple[str, ...]:
    """Reorders the channels of every elastic width by importance; gives the sizes it sorted.

    The largest network computes what it did: each reordering is tried on a copy first, and one
    that changes its output, as where channels meet a module that is not elastic, is left out.
    Inner widths of blocks and widths that residual connections share are sorted alike; heads of
    `Attention` move as a whole. Sizes are told apart by their declarations, so equal products in
    several blocks get one order, by their summed importance.

    `keep`: by decision, options that are trained already. No channel then crosses their widths.
    State of optimisers does not move along: make them afterwards.
    """
    trial = copy.deepcopy(supernet)
    largest = supernet.uniform(1.0)
    trial.activate(largest)
    trial.eval()
    first = next(supernet.parameters())
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4, *supernet.shape, generator=generator).to(first)
    expected = _run(trial, inputs)
    done = []
    for dim, group in _groups(supernet).items():
        if not group.read or not group.written:
            continue
        order = _order(supernet, group, _edges(dim, keep or {}))
        backup = copy.deepcopy(trial.state_dict())
        _permute(trial, group, order)
        if float((_run(trial, inputs) - expected).abs().max()) > TOLERANCE * _scale(expected):
            trial.load_state_dict(backup)
            continue
        _permute(supernet, group, order)
        done.append(text(dim))
    return tuple(done)


@torch.no_grad()
def _run(net: nn.Module, inputs: Tensor) -> Tensor:
    out: Tensor = net(inputs)
    return out


def _scale(outputs: Tensor) -> float:
    return float(outputs.abs().max().clamp_min(1e-12))


def _groups(root: nn.Module) -> dict[Dim, _Group]:
    """The tensors of each elastic width."""
    found: dict[Dim, _Group] = defaultdict(_Group)

    def note(dim: Dim, written: Sequence[tuple[str, int]], read: Sequence[tuple[str, int]]) -> None:
        if decisions(dim):
            found[dim].written.extend(written)
            found[dim].read.extend(read)

    for path, module in root.named_modules():
        prefix = f"{path}." if path else ""
        weight, bias = f"{prefix}weight", f"{prefix}bias"
        if isinstance(module, DepthwiseConv2d):
            note(module.out_channels, [(weight, 0), (bias, 0)], [])
        elif isinstance(module, Conv2d):
            note(module.out_channels, [(weight, 0), (bias, 0)], [])
            note(module.in_channels, [], [(weight, 1)])
        elif isinstance(module, Linear):
            note(module.out_features, [(weight, 0), (bias, 0)], [])
            note(module.in_features, [], [(weight, 1)])
        elif isinstance(module, BatchNorm2d):
            names = (weight, bias, f"{prefix}running_mean", f"{prefix}running_var")
            note(module.channels, [(name, 0) for name in names], [])
        elif isinstance(module, LayerNorm):
            note(module.features, [(weight, 0), (bias, 0)], [])
        elif isinstance(module, Parameter):
            for place, dim in enumerate(module.dims):
                note(dim, [(f"{prefix}value", place)], [])
        elif isinstance(module, Attention) and decisions(module.query.out_features):
            found[module.query.out_features].block = module.head_width
    return found


def _tensors(root: nn.Module) -> dict[str, Tensor]:
    return {**dict(root.named_parameters()), **dict(root.named_buffers())}


def _edges(dim: Dim, keep: Mapping[str, Sequence[Option]]) -> list[int]:
    """Where no channel may cross: the sizes under every combination of options to keep."""
    own = decisions(dim)
    if not any(d.name in keep for d in own):
        return []
    for d in own:
        wrong = [option for option in keep.get(d.name, ()) if option not in options(d)]
        if wrong:
            raise SpaceError(f"keep: {d.name!r} has no option {wrong[0]!r}")
    kept = [keep.get(d.name, options(d)[-1:]) for d in own]
    names = [d.name for d in own]
    return sorted(size(dim, dict(zip(names, c, strict=True))) for c in product(*kept))


def _order(root: nn.Module, group: _Group, edges: Sequence[int]) -> Tensor:
    """The channels, the most important first, each between the edges where it was."""
    tensors = _tensors(root)
    total: Tensor | None = None
    for name, dim in group.read:
        own = tensors[name].detach().float().abs().movedim(dim, 0).flatten(1).sum(1)
        total = own if total is None else total + own
    assert total is not None
    blocks = total.reshape(-1, group.block).sum(1)
    bounds = sorted({0, len(blocks), *(edge // group.block for edge in edges)})
    order = [
        low + torch.argsort(blocks[low:high], descending=True, stable=True)
        for low, high in pairwise(bounds)
    ]
    within = torch.arange(group.block, device=blocks.device)
    return (torch.cat(order)[:, None] * group.block + within).flatten()


@torch.no_grad()
def _permute(root: nn.Module, group: _Group, order: Tensor) -> None:
    tensors = _tensors(root)
    for name, dim in [*group.written, *group.read]:
        if name in tensors:  # a bias may be absent
            tensor = tensors[name]
            tensor.copy_(tensor.index_select(dim, order.to(tensor.device)))
