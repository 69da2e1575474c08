"""SynFlow: how much flows through a network whose weights are all positive, in log space.

Tanaka, Kunin, Yamins & Ganguli, "Pruning neural networks without any data by iteratively
conserving synaptic flow" (NeurIPS 2020), https://arxiv.org/abs/2006.05467; without norms, and
summed over the network, as by Abdelfattah et al. (ICLR 2021).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from espalier.estimators.zero_cost.borrow import borrowed, weighted
from espalier.estimators.zero_cost.flow import flow
from espalier.estimators.zero_cost.sweep import gradients

# the log where nothing flows: less than any network that something flows through
NOTHING = math.log(torch.finfo(torch.float32).tiny)


def synflow(network: nn.Module, shape: Sequence[int]) -> float:
    """Log of the sum over weights of weight times gradient of the summed outputs, for one input of
    ones `(*shape)`, with the magnitude of every parameter in its place and norms left out.

    Flow grows by a factor a layer; it is carried as numbers near 1 and an exponent of two, so it
    overflows at no depth. Activations pass what is positive unchanged, as ReLU does.
    """
    weights: list[Tensor] = [layer.weight for layer in weighted(network)]  # type: ignore[misc]
    with positive(network), borrowed(network, weights), torch.enable_grad():
        out = network(flow(weights[0].new_ones(1, *shape)))
        exponent: int = getattr(out, "exponent", 0)
        found = gradients(out.as_subclass(Tensor).sum(), weights)
        parts = [(w.detach() * g).double().sum() for w, g in zip(weights, found, strict=True)]
        total = float(torch.stack(parts).sum())
    return math.log(total) + exponent * math.log(2.0) if total > 0 else NOTHING


@contextmanager
def positive(network: nn.Module) -> Iterator[None]:
    """Within this context every parameter of a network is its own magnitude."""
    kept = [(p, p.detach().clone()) for p in network.parameters()]
    with torch.no_grad():
        for parameter, _ in kept:
            parameter.abs_()
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, values in kept:
                parameter.copy_(values)
