"""Proxies that weigh each weight by the gradient of the loss, summed over the network.

grad_norm, plain and the sums of the others over whole networks: Abdelfattah, Mehrotra, Dudziak &
Lane, "Zero-Cost Proxies for Lightweight NAS" (ICLR 2021), https://arxiv.org/abs/2101.08134.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from espalier.errors import EspalierError
from espalier.estimators.zero_cost.borrow import borrowed, weighted
from espalier.estimators.zero_cost.quick import Quick
from espalier.estimators.zero_cost.sweep import Loss, Sweep, gradients, laid_out


def grad_norm(found: Sweep) -> float:
    """Sum over layers of the Euclidean norm of the gradient (Abdelfattah et al., 2021)."""
    return float(sum(g.norm() for g in found.gradients))


def plain(found: Sweep) -> float:
    """Sum of weight times gradient (Abdelfattah et al., 2021).

    A convolution before a batch norm adds nothing to it: its weight and gradient are at right
    angles. What is left of it there is rounding, and the last layer.
    """
    pairs = zip(found.weights, found.gradients, strict=True)
    return float(sum((w.double() * g.double()).sum() for w, g in pairs))


def snip(found: Sweep) -> float:
    """Sum of the magnitude of weight times gradient (Lee, Ajanthan & Torr, SNIP, ICLR 2019)."""
    pairs = zip(found.weights, found.gradients, strict=True)
    return float(sum((w * g).abs().sum() for w, g in pairs))


def grasp(found: Sweep) -> float:
    """Minus the sum of weight times (Hessian times gradient) (Wang, Zhang & Grosse, GraSP, ICLR
    2020): how much the flow of gradient falls when all weights go."""
    return -found.curvature


def fisher(found: Sweep) -> float:
    """Sum over channels of half the squared product of activation and gradient, times the weights
    of the channel (Turner et al., BlockSwap, ICLR 2020; summed as by Abdelfattah et al., 2021)."""
    return float(sum(channels.sum() * weights for channels, weights in found.fisher))


def l2(weights: Sequence[Tensor]) -> float:
    """Sum over layers of the Euclidean norm of the weights (Abdelfattah et al., 2021)."""
    return float(sum(w.norm() for w in weights))


def zico(network: nn.Module, inputs: Tensor, labels: Tensor, loss: Loss, parts: int = 2) -> float:
    """Sum over layers of the log of the summed ratios of a gradient's mean magnitude to its
    standard deviation over mini-batches (Li, Yang, Bhardwaj & Marculescu, ZiCo, ICLR 2023).

    The mini-batches are the `parts` of the batch, each with batch-norm statistics of its own, as
    published: two of half the size, by default. Weights whose gradient does not vary don't count.
    Errors: `EspalierError` where a part would hold fewer than 2 examples.
    """
    if len(inputs) < 2 * parts:
        raise EspalierError(
            f"zico compares the gradients of {parts} mini-batches of 2 or more examples, the batch "
            f"has {len(inputs)}: give a larger batch"
        )
    weights: list[Tensor] = [layer.weight for layer in weighted(network)]  # type: ignore[misc]
    found = []
    with borrowed(network, weights), torch.enable_grad(), Quick():
        halves = zip(inputs.tensor_split(parts), labels.tensor_split(parts), strict=True)
        for x, y in halves:
            found.append(gradients(loss(network(laid_out(x)), y), weights))
    total = 0.0
    for layer in zip(*found, strict=True):
        total += _ratio(torch.stack([g.flatten() for g in layer]))
    return total


def _ratio(over: Tensor) -> float:
    """Log of the sum of mean magnitude over deviation, for gradients `(parts, weights)`."""
    deviation = over.std(0, correction=0)
    varies = deviation > 0
    total = (over.abs().mean(0)[varies] / deviation[varies]).sum()
    return float(total.log()) if total > 0 else 0.0
