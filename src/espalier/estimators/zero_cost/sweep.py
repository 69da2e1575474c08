"""One forward pass of a batch and its backward passes: what most proxies are computed from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from espalier.errors import EspalierError
from espalier.estimators.zero_cost.borrow import borrowed, weighted
from espalier.estimators.zero_cost.graph import codes
from espalier.estimators.zero_cost.quick import Quick

Loss = Callable[[Tensor, Tensor], Tensor]

# what a proxy may ask of a sweep
GRADIENTS, FISHER, JACOBIAN, CODES, CURVATURE = (
    "gradients",
    "fisher",
    "jacobian",
    "codes",
    "curvature",
)


@dataclass
class Sweep:
    """What was found on one batch of b inputs; what was not asked for is empty.

    - `classes`: width of the output.
    - `weights`, `gradients`: of convolutions and linear layers, and of the loss with respect to
      them (zero where a weight does not reach the output).
    - `fisher`: for each layer that ran, half the squared product of activation and gradient,
      summed over places and averaged over the batch, `(channels,)`, and its weights a channel.
    - `jacobian`: gradient of the sum of the outputs with respect to the inputs, `(b, n)`.
    - `codes`: for each ReLU that reaches the output, which units are on, `(b, units)`.
    - `curvature`: the sum over weights of weight times (Hessian of the loss times gradient).
    """

    weights: list[Tensor]
    classes: int = 0
    gradients: list[Tensor] = field(default_factory=list)
    fisher: list[tuple[Tensor, float]] = field(default_factory=list)
    jacobian: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    codes: list[Tensor] = field(default_factory=list)
    curvature: float = 0.0


def sweep(
    network: nn.Module, inputs: Tensor, labels: Tensor, loss: Loss, needs: frozenset[str]
) -> Sweep:
    """Runs the batch once forward, and backward as often as `needs` ask: the loss to the weights,
    the sum of the outputs to the inputs alone, and for `curvature` the first of them again.

    Images are laid out channels last, where convolutions are fastest. The network is left as it
    was. Errors: `EspalierError` for inputs that can't have a gradient.
    """
    layers = weighted(network)
    weights: list[Tensor] = [layer.weight for layer in layers]  # type: ignore[misc]
    out = Sweep([w.detach() for w in weights])
    x = laid_out(inputs)
    if JACOBIAN in needs:
        if not x.is_floating_point():
            raise EspalierError(
                f"jacob_cov and epe_nas differentiate with respect to the inputs, which are "
                f"{x.dtype} here: leave them out of the measures"
            )
        x.requires_grad_()
    # fused attention has no second derivative
    plain = sdpa_kernel(SDPBackend.MATH) if CURVATURE in needs else nullcontext()
    with borrowed(network, weights), torch.enable_grad(), plain, Quick():
        watch = _Watch()
        with watch.listening(layers if FISHER in needs else []):
            outputs = network(x)
        out.classes = outputs.shape[-1]
        if CODES in needs:
            out.codes = codes(outputs, len(x))
        if JACOBIAN in needs:
            out.jacobian = gradients(outputs.sum(), [x], retain=True)[0].flatten(1)
        if needs & {GRADIENTS, FISHER, CURVATURE}:
            watch.on = True
            found = gradients(loss(outputs, labels), weights, create=CURVATURE in needs)
            watch.on = False
            out.gradients, out.fisher = [g.detach() for g in found], watch.found
        if CURVATURE in needs:
            out.curvature = _curvature(found, weights)
    return out


def laid_out(inputs: Tensor) -> Tensor:
    """A copy without history, images with their channels last."""
    x = inputs.detach().clone()
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def gradients(
    value: Tensor, weights: Sequence[Tensor], retain: bool = False, create: bool = False
) -> list[Tensor]:
    """The gradient of a scalar with respect to each weight, zero where it does not reach it."""
    if not value.requires_grad:  # no weight is on the way to the output
        return [torch.zeros_like(w) for w in weights]
    found = torch.autograd.grad(
        value, weights, retain_graph=retain or create, create_graph=create, allow_unused=True
    )
    return [torch.zeros_like(w) if g is None else g for g, w in zip(found, weights, strict=True)]


def _curvature(found: Sequence[Tensor], weights: Sequence[Tensor]) -> float:
    """Sum of w * (H g): one more backward pass, of the product of g and itself held still."""
    alive = [(g.detach() * g).sum() for g in found if g.requires_grad]
    if not alive:
        return 0.0
    twice = gradients(torch.stack(alive).sum(), weights)
    pairs = zip(weights, twice, strict=True)
    return float(sum((w.detach().double() * h.double()).sum() for w, h in pairs))


class _Watch:
    """Listens at the outputs of layers, and to the gradient that comes back to each."""

    def __init__(self) -> None:
        self.on = False
        self.found: list[tuple[Tensor, float]] = []

    @contextmanager
    def listening(self, layers: Sequence[nn.Module]) -> Iterator[None]:
        """Within this context, each layer that runs is noted."""
        handles = [layer.register_forward_hook(self._leave) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _leave(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            held = output.detach()  # a hook that holds its own tensor keeps the graph for ever
            output.register_hook(lambda gradient: self._back(module, held, gradient))  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _back(self, module: nn.Module, output: Tensor, gradient: Tensor) -> None:
        # an activation that was overwritten by a ReLU in place serves as well: where the ReLU is
        # off, the gradient is zero
        if not self.on:
            return
        product = output * gradient.detach()
        if isinstance(module, nn.Linear):
            product = product.flatten(1, -2).sum(1) if product.ndim > 2 else product
        else:
            product = product.flatten(2).sum(2)
        weight: Tensor = module.weight  # type: ignore[assignment]
        channels = product.shape[1]
        self.found.append((product.square().mean(0) / 2, weight.numel() / channels))
