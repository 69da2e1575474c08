"""W-PCA: how many principal components the feed-forward layers use, times the parameters.

Wang, "W-PCA Based Gradient-Free Proxy for Efficient Search of Lightweight Language Models" (ICLR
2025), https://arxiv.org/abs/2504.15983. A forward pass only: no labels, no gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from espalier.errors import EspalierError
from espalier.estimators.zero_cost.borrow import borrowed

_ACTIVATIONS = {"relu", "gelu", "silu", "relu6", "hardswish", "leaky_relu", "elu", "mish"}
_ROWS = 4096  # tokens are plenty for a covariance


def w_pca(network: nn.Module, inputs: Tensor, share: float = 0.99) -> float:
    """Principal components a layer, in the mean over layers, times the number of parameters.

    See `components`.
    """
    found = components(network, inputs, share)
    return sum(found) / len(found) * sum(p.numel() for p in network.parameters())


def components(network: nn.Module, inputs: Tensor, share: float = 0.99) -> list[int]:
    """For each feed-forward layer, how many principal components of its hidden values, before the
    activation, hold `share` of their variance over the tokens of `inputs`.

    Errors: `EspalierError` for a network without activations between linear layers.
    """
    if not 0 < share <= 1:
        raise EspalierError(f"the share of variance is above 0 and at most 1, got {share}")
    seen = _Hidden(share)
    with borrowed(network), torch.no_grad(), seen:
        network(inputs)
    if not seen.found:
        raise EspalierError(
            "w_pca reads the hidden layers of feed-forward blocks, and no activation runs in this "
            "network: leave it out of the measures"
        )
    return seen.found


def principal(values: Tensor, share: float) -> int:
    """How many principal components hold `share` of the variance of rows `(n, d)`; 0 for none."""
    centred = values - values.mean(0)
    small = centred.T @ centred if len(values) >= values.shape[1] else centred @ centred.T
    powers = torch.linalg.eigvalsh(small).clamp_min(0).flip(0)
    total = powers.sum()
    if total <= 0:
        return 0
    return int((powers.cumsum(0) < share * total).sum()) + 1


class _Hidden(TorchFunctionMode):
    """Counts the components of what each activation reads."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share
        self.found: list[int] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "").strip("_")
        if name in _ACTIVATIONS:
            x: Tensor = args[0] if args else (kwargs or {})["input"]
            rows = x.movedim(1, -1) if x.ndim == 4 else x  # channels of images come second
            self.found.append(principal(rows.flatten(0, -2)[:_ROWS], self.share))
        return func(*args, **(kwargs or {}))
