"""Depth entropy: how much a network can express by its widths, depth and resolutions alone.

After Shen, Wang, Sun, Lin et al., "DeepMAD: Mathematical Architecture Design for Deep Convolutional
Neural Network" (CVPR 2023), https://arxiv.org/abs/2303.02165. What differs: the layers of any
network are read off one pass, so parallel branches count one after the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from espalier.costs import count
from espalier.estimators.zero_cost.borrow import borrowed, weighted

_LAST = 8.0  # weight of the last stage's entropy; the others weigh 1, as published


@dataclass(frozen=True)
class Shape:
    """A layer's inputs to one output, and its output: channels and places."""

    fan_in: int
    channels: int
    places: int


def counts(network: nn.Module, example: Tensor) -> tuple[float, float]:
    """Parameters, and multiply-accumulates for one input."""
    found = count(network, example[:1])
    return float(found.params), float(found.macs)


def shapes(network: nn.Module, example: Tensor) -> list[Shape]:
    """The convolutions and linear layers that run on one input, in order of execution."""
    found: list[Shape] = []

    def note(module: nn.Module, args: Any, output: Tensor) -> None:
        weight: Tensor = module.weight  # type: ignore[assignment]
        linear = isinstance(module, nn.Linear)
        channels = output.shape[-1] if linear else output.shape[1]
        places = math.prod(output.shape[1:-1] if linear else output.shape[2:])
        found.append(Shape(weight[0].numel(), channels, places))

    handles = [layer.register_forward_hook(note) for layer in weighted(network)]
    try:
        with borrowed(network), torch.no_grad():
            network(torch.cat([example[:1]] * 2))  # batch norms need two values a channel
    finally:
        for handle in handles:
            handle.remove()
    return found


def depth_entropy(layers: list[Shape]) -> float:
    """Sum over stages of weight * log(places * channels) * sum of half log fan-ins so far.

    A stage is a run of layers at one resolution, the classifier aside; the last weighs 8, the
    others 1.
    """
    body = [layer for layer in layers if layer.places > 1] or layers
    total, so_far = 0.0, 0.0
    for i, layer in enumerate(body):
        so_far += 0.5 * math.log(layer.fan_in)
        last = i + 1 == len(body)
        if last or body[i + 1].places != layer.places:
            weight = _LAST if last else 1.0
            total += weight * math.log(layer.places * layer.channels) * so_far
    return total
