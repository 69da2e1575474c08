"""What running any network takes: its device, its mode, the layout of what goes in."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

# What torch says where a forward takes a view of values whose channels lie together.
_NO_VIEW = "view size is not compatible"
_allowed: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: where its first weight is; the processor, if it has none."""
    first = next(module.parameters(), None)
    return torch.device("cpu") if first is None else first.device


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Puts every module into evaluation mode, and back into its own mode afterwards."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def channels_last(x: Tensor) -> Tensor:
    """Images with their channels together in memory, where convolutions are fastest."""
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def laid_out(network: nn.Module, x: Tensor) -> Tensor:
    """Inputs of a network, images with their channels together in memory where it runs on that.

    What flattens by `view`, as many users' models do, does not: it gets rows of pixels.
    """
    if x.ndim != 4:
        return x
    return channels_last(x) if _allows(network, x) else x.contiguous()


def lay_out(network: nn.Module, x: Tensor) -> None:
    """Gives the weights of a network, in place, the layout that its inputs such as `x` have."""
    if x.ndim != 4 or not _allows(network, x):
        return
    for tensor in itertools.chain(network.parameters(), network.buffers()):
        tensor.data = channels_last(tensor.data)


def _allows(network: nn.Module, x: Tensor) -> bool:
    """Whether the network runs with channels together, found out once by one example."""
    if network not in _allowed:
        _allowed[network] = _runs(network, channels_last(x[:1].detach().clone()))
    return _allowed[network]


def _runs(network: nn.Module, x: Tensor) -> bool:
    with evaluating(network), torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            network(x.to(device_of(network)))
        except Exception as error:
            return _NO_VIEW not in str(error)  # of anything else the caller's own run will tell
    return True
