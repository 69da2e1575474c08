"""Zen-score: how far a network of Gaussian weights moves its features when the input moves a bit.

Lin, Wang, Sun, Chen, Sun, Qian, Li & Jin, "Zen-NAS: A Zero-Shot NAS for High-Performance Image
Recognition" (ICCV 2021), https://arxiv.org/abs/2102.01063. Shortcuts stay in, as in
NAS-Bench-Suite-Zero (Krishnakumar et al., 2022), since no module says where its shortcuts are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from espalier.errors import EspalierError
from espalier.estimators.zero_cost.borrow import WEIGHTED, borrowed, norms
from espalier.estimators.zero_cost.quick import Quick
from espalier.train.running import device_of

_STEP = 0.01  # as published


def zen(network: nn.Module, shape: Sequence[int], seed: int = 0, batch: int = 16) -> float:
    """Log of the mean change of the last feature map, plus the log of each batch norm's scale.

    Weights and inputs `(batch, *shape)` are standard normal, drawn from `seed`; the inputs move by
    0.01 of another such draw. The scale of a norm is the root of its batch variance, averaged over
    channels. Networks without batch norms are run in double precision, in which hundreds of layers
    don't overflow. Errors: `EspalierError` for a network without convolutions.
    """
    if not any(isinstance(m, _ConvNd) for m in network.modules()):
        raise EspalierError(
            "zen feeds noise to a network of convolutions, this one has none: leave it out of the "
            "measures"
        )
    normed = norms(network)
    wide = torch.float32 if normed else torch.float64
    random = torch.Generator().manual_seed(seed)
    x, e = torch.randn(2, batch, *shape, generator=random).unbind()
    both = torch.stack([x, x + _STEP * e]).to(device_of(network), wide)
    with borrowed(network), gaussian(network, random, wide), torch.no_grad(), Quick():
        scales = _Scales(normed)
        first = _last_map(network, both[0], scales)
        second = _last_map(network, both[1], None)
    change = float((first - second).abs().flatten(1).sum(1).double().mean())
    tiny = torch.finfo(torch.float32).tiny  # nothing moves: the least there is
    return math.log(max(change, tiny)) + scales.total


def _last_map(network: nn.Module, x: Tensor, scales: _Scales | None) -> Tensor:
    if x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    seen = LastMap()
    with seen:
        if scales is None:
            network(x)
        else:
            with scales.listening():
                network(x)
    if seen.found is None:
        raise EspalierError(
            "zen compares feature maps, and this network makes none: leave it out of the measures"
        )
    return seen.found


class LastMap(TorchFunctionMode):
    """Keeps the last result with more than one place: `(b, c, h, w)`, `(b, c, l)`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Tensor | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.ndim > 2 and math.prod(out.shape[2:]) > 1:
            self.found = out
        return out


class _Scales:
    """The sum over norms of the log of their scale, as a pass goes by."""

    def __init__(self, modules: Sequence[_NormBase]) -> None:
        self.modules, self.total = modules, 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        handles = [m.register_forward_pre_hook(self._enter) for m in self.modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        dims = [d for d in range(x.ndim) if d != 1]
        variance = float(x.var(dims, correction=0).mean())
        if variance > 0:  # a norm that nothing reaches has no scale
            self.total += math.log(variance) / 2


@contextmanager
def gaussian(network: nn.Module, random: torch.Generator, dtype: torch.dtype) -> Iterator[None]:
    """Within this context weights are standard normal, biases zero and norms do not rescale."""
    kept = [(p, p.data) for p in network.parameters()]
    buffers = [(m, k, b) for m in network.modules() for k, b in m._buffers.items()]
    try:
        for module in network.modules():
            for name, parameter in module.named_parameters(recurse=False):
                drawn = name == "weight" and isinstance(module, WEIGHTED)
                still = name == "weight" and isinstance(module, (_NormBase, nn.GroupNorm))
                if drawn:
                    parameter.data = torch.randn(parameter.shape, generator=random).to(
                        parameter.device, dtype
                    )
                elif still:
                    parameter.data = torch.ones_like(parameter, dtype=dtype)
                elif name == "bias":
                    parameter.data = torch.zeros_like(parameter, dtype=dtype)
                else:
                    parameter.data = parameter.data.to(dtype)
        for module, key, buffer in buffers:
            if buffer is not None and buffer.is_floating_point() and dtype != buffer.dtype:
                module._buffers[key] = buffer.to(dtype)
        yield
    finally:
        for parameter, values in kept:
            parameter.data = values
        for module, key, buffer in buffers:
            module._buffers[key] = buffer
