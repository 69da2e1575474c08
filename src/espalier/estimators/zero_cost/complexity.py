"""The two complexities of As-ViT: how well a network trains, and how much it bends a curve.

Chen, Huang, Du, Song, Wang & Zhou, "Auto-scaling Vision Transformers without Training" (ICLR 2022),
https://arxiv.org/abs/2202.11921. What differs: both are logs, and the curve is followed by forward
differentiation, one pass in place of one backward pass an output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from espalier.estimators.zero_cost.borrow import borrowed, norms, weighted
from espalier.estimators.zero_cost.sweep import gradients

_NORMS = {"batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm"}
_LEAST = 1e-12  # of the largest eigenvalue: below it is rounding


def ntk_condition(network: nn.Module, inputs: Tensor) -> float:
    """Minus the log of the condition number of the neural tangent kernel of `inputs` `(b, ...)`.

    The kernel `(b, b)` is made of the gradients of each input's summed outputs with respect to
    the weights of convolutions and linear layers. At most 27.6, the log of 1e12, below zero.
    """
    weights: list[Tensor] = [layer.weight for layer in weighted(network)]  # type: ignore[misc]
    rows = []
    with borrowed(network, weights), torch.enable_grad():
        if norms(network):  # each output hangs on the whole batch
            outputs = network(inputs).flatten(1).sum(1)
            last = len(inputs) - 1
            for i, value in enumerate(outputs):
                rows.append(_flat(gradients(value, weights, retain=i < last)))
        else:
            for x in inputs:
                rows.append(_flat(gradients(network(x[None]).sum(), weights)))
    gradient = torch.stack(rows)
    values = torch.linalg.eigvalsh((gradient @ gradient.T).double())
    most = float(values[-1])
    if most <= 0:
        return math.log(_LEAST)
    return math.log(max(float(values[0]) / most, _LEAST))


def _flat(found: Sequence[Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in found])


def length_distortion(
    network: nn.Module, shape: Sequence[int], seed: int = 0, points: int = 64
) -> float:
    """Log of how much longer a circle of inputs is in the features: its length there over 2 pi.

    The features are what the last linear layer reads (the outputs, where there is none). The circle
    has radius 1 in the plane of two orthonormal directions drawn from `seed`, is taken at `points`
    places, and norms are left out, as published.
    """
    random = torch.Generator().manual_seed(seed)
    plane = torch.linalg.qr(torch.randn(math.prod(shape), 2, generator=random))[0]
    angles = torch.arange(points) * (2 * math.pi / points)
    circle = torch.stack([angles.cos(), angles.sin()], 1) @ plane.T
    along = torch.stack([-angles.sin(), angles.cos()], 1) @ plane.T
    with borrowed(network), torch.no_grad(), WithoutNorms(), sdpa_kernel(SDPBackend.MATH):
        network.eval()  # norms do nothing: they need not count batches either
        like = next(network.parameters())
        places, ways = (t.reshape(-1, *shape).to(like) for t in (circle, along))
        speed: Tensor = torch.func.jvp(_features(network), (places,), (ways,))[1]
    length = float(speed.flatten(1).double().norm(dim=1).mean())
    return math.log(max(length, torch.finfo(torch.float32).tiny))


def _features(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """The network up to what its last linear layer reads."""

    def run(x: Tensor) -> Tensor:
        seen: list[Tensor] = []
        linear = [m for m in network.modules() if isinstance(m, nn.Linear)]
        handles = [m.register_forward_pre_hook(lambda _, a: seen.append(a[0])) for m in linear]
        try:
            seen.insert(0, network(x))
        finally:
            for handle in handles:
                handle.remove()
        return seen[-1]

    return run


class WithoutNorms(TorchFunctionMode):
    """Within this context norms do nothing."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "__name__", "") in _NORMS:
            return args[0] if args else (kwargs or {})["input"]
        return func(*args, **(kwargs or {}))
