"""A network borrowed for a measurement: set up alike, and given back exactly as it came."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from espalier.errors import EspalierError

WEIGHTED = (_ConvNd, nn.Linear)


def weighted(network: nn.Module) -> list[nn.Module]:
    """The convolutions and linear layers, in the order of the network; a tied weight once.

    Errors: `EspalierError` where there are none.
    """
    found: dict[int, nn.Module] = {}
    for module in network.modules():
        if isinstance(module, WEIGHTED):
            found.setdefault(id(module.weight), module)
    if not found:
        raise EspalierError(
            f"zero-cost proxies look at the weights of convolutions and linear layers, "
            f"{type(network).__name__} has none: score it by params, or by training it"
        )
    return list(found.values())


def norms(network: nn.Module) -> list[_NormBase]:
    """The norms that compute statistics of the batch."""
    return [m for m in network.modules() if isinstance(m, _NormBase)]


@contextmanager
def borrowed(network: nn.Module, learned: Sequence[Tensor] = ()) -> Iterator[None]:
    """Batch norms use the statistics of the batch, dropout is off, only `learned` get gradients.

    Afterwards modes, buffers (running statistics), `requires_grad` and torch's random state are
    what they were. Gradients are never accumulated into `.grad` by what runs inside.
    """
    modes = [(module, module.training) for module in network.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in network.buffers()]
    wanted = [(p, p.requires_grad) for p in network.parameters()]
    chosen = {id(p) for p in learned}
    network.eval()
    for norm in norms(network):
        norm.train()
    for parameter, _ in wanted:
        parameter.requires_grad_(id(parameter) in chosen)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, before in wanted:
            parameter.requires_grad_(before)
        with torch.no_grad():
            for buffer, values in buffers:
                buffer.copy_(values)
