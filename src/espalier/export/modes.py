"""A network looked at as it is deployed, and given back as it was."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def deployed(network: nn.Module) -> Iterator[nn.Module]:
    """The same network in evaluation mode, without gradients; modes are restored on leaving."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with torch.no_grad():
            yield network
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """torch's own attention as its single operations, not as one opaque operator (its fast path),
    which no exporter and no count can see into."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def frozen(network: nn.Module) -> nn.Module:
    """A float32 copy on the CPU in evaluation mode, in torch's default memory layout."""
    twin: nn.Module = copy.deepcopy(network).to(device="cpu", dtype=torch.float32)
    for tensor in (*twin.parameters(), *twin.buffers()):
        tensor.data = tensor.data.contiguous()
    return twin.eval().requires_grad_(False)
