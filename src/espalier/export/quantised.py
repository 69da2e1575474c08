"""Networks with fake quantisation as ONNX: integers inside, quantised and dequantised explicitly.

A copy of the network computes in float, with a mark wherever a tensor is rounded; it is exported as
any network is, and the marks tell `qdq` where to put which scales. What ONNX Runtime then fuses into
integer kernels computes what the fake quantisation computes, but for sums that fall on a tie.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from espalier.errors import ExportError
from espalier.export.placing import put
from espalier.export.quantisers import Quantised, Quantiser, unquantised

DOMAIN, MARK = "espalier", "Mark"


@dataclass(frozen=True)
class Weights:
    """A quantised layer's weight in float, its scales, and how it is quantised."""

    values: NDArray[np.float32]
    scales: NDArray[np.float32]
    bits: int
    block: int


@dataclass(frozen=True)
class Rounding:
    """What a mark stands for: levels of the tensor (None: it stays float), and the layer's weight
    where the mark is a layer's input."""

    levels: tuple[float, int] | None
    weights: Weights | None


def marked(network: nn.Module) -> tuple[nn.Module, dict[str, Rounding]]:
    """A float copy with marks in place of quantisers, and what each mark stands for."""
    twin = copy.deepcopy(network)
    roundings: dict[str, Rounding] = {}
    if isinstance(twin, Quantised):  # a layer alone: give it a parent to be replaced in
        twin = nn.Sequential(twin)
    for name, module in list(twin.named_modules()):
        if isinstance(module, Quantised):
            roundings[name] = Rounding(_levels(module.input_quantiser), _weights(module))
            mark = nn.Sequential(Mark(name), unquantised(module))
            put(twin, name, mark)
    for name, module in list(twin.named_modules()):
        if isinstance(module, Quantiser):
            roundings[name] = Rounding(_levels(module), None)
            put(twin, name, Mark(name))
    return twin, roundings


def _levels(quantiser: nn.Module) -> tuple[float, int] | None:
    if not isinstance(quantiser, Quantiser):
        return None
    return float(quantiser.scale), int(quantiser.zero_point)


def _weights(layer: Quantised) -> Weights:
    scales = layer.scales().detach().float().cpu().numpy()
    return Weights(layer.weight.detach().float().cpu().numpy(), scales, layer.bits, layer.block)


class Mark(nn.Module):
    """Passes its input on; in ONNX it is a node of this name, whichever exporter is used."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        """The input."""
        if torch.jit.is_tracing():  # type: ignore[no-untyped-call]
            made: Tensor = _TracedMark.apply(x, self.name)  # type: ignore[no-untyped-call]
            return made
        return _symbolic()(
            f"{DOMAIN}::{MARK}", [x], attrs={"name": self.name}, dtype=x.dtype, shape=x.shape
        )


class _TracedMark(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
        return x.clone()

    @staticmethod
    def symbolic(g: Any, x: Any, name: str) -> Any:
        return g.op(f"{DOMAIN}::{MARK}", x, name_s=name).setType(x.type())


def _symbolic() -> Callable[..., Tensor]:
    ops = getattr(torch.onnx, "ops", None)
    if ops is None or not hasattr(ops, "symbolic"):
        raise ExportError(
            f"torch {torch.__version__} can't export quantised networks: install torch 2.8 or newer"
        )
    found: Callable[..., Tensor] = ops.symbolic
    return found
