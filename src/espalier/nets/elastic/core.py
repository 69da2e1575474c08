"""What every elastic module is: a module on which decisions act.

A module with several sizes holds the weights of the largest. `settle` says which part of them
`forward` runs; `plain` gives that part as a torch module of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from espalier.nets.elastic.dims import Choices
from espalier.space import Decision, Option

When = dict[str, tuple[Option, ...]]


class Maker(Protocol):
    """Makes plain copies under given choices: with the same weights, or with fresh ones."""

    choices: Choices
    fresh: bool

    def __call__(self, module: nn.Module) -> nn.Module: ...


class Elastic(nn.Module):
    """Base of the elastic modules. Its children, if any, are alternatives or repetitions."""

    def decisions(self) -> tuple[Decision, ...]:
        """The decisions that act here, not counting those inside children."""
        raise NotImplementedError

    def branches(self) -> Iterator[tuple[nn.Module, When]]:
        """The children, each with the options of this module's decision that make it run."""
        return iter(())

    def settle(self, choices: Choices) -> None:
        """Makes `forward` run what `choices` says. `choices` holds all of `decisions()`."""
        raise NotImplementedError

    def plain(self, make: Maker) -> nn.Module:
        """A copy without elasticity of what `make.choices` says; `make` copies children."""
        raise NotImplementedError


def initialise(layer: nn.Module) -> None:
    """Fresh weights for one torch layer: Kaiming for convolutions (He et al., 2015).

    Other layers keep torch's own way. The fan is that of the inputs, which is also right for
    depthwise convolutions.
    """
    if isinstance(layer, nn.Conv2d):
        nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
        return
    reset = getattr(layer, "reset_parameters", None) or getattr(layer, "_reset_parameters", None)
    if reset is not None:
        reset()


def filled(
    layer: nn.Module, make: Maker, tensors: dict[str, Tensor], source: nn.Module
) -> nn.Module:
    """A torch layer made on the meta device, given copies of `tensors`, or fresh weights.

    Layers are made on the meta device because copying must not draw from the random generator.
    `source` is the elastic layer whose parameters say what is trainable.
    """
    device = next(iter(tensors.values())).device
    if make.fresh:
        layer.to_empty(device=device)
        initialise(layer)
    else:
        copies = {
            name: tensor.detach().clone(memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }
        layer.load_state_dict(copies, strict=True, assign=True)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(source.get_parameter(name).requires_grad)
    return layer.train(source.training)
