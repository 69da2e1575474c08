"""Linear layers and norms whose sizes are decisions: the first features of the largest."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espalier.errors import SpaceError
from espalier.nets.elastic.core import Elastic, Maker, filled, initialise
from espalier.nets.elastic.dims import Choices, Dim, decisions, ends, size, text
from espalier.nets.elastic.masks import Spread, aligned, spread
from espalier.nets.elastic.mixing import Weights, no_gates, resolve
from espalier.nets.elastic.slices import cut
from espalier.space import Decision


class Linear(Elastic):
    """A linear layer `(..., in) -> (..., out)`; both are sizes."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    masks = True  # whether a mixture of output sizes masks the output; else what follows does

    def __init__(self, in_features: Dim, out_features: Dim, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        inputs = ends(in_features, "number of features")[1]
        outputs = ends(out_features, "number of features")[1]
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        self.reset_parameters()
        self._set(inputs, outputs)

    def reset_parameters(self) -> None:
        """Fresh weights, as torch's own layer has them."""
        outputs, inputs = self.weight.shape
        layer = nn.Linear(inputs, outputs, bias=self.bias is not None, device="meta")
        layer.weight = self.weight
        layer.register_parameter("bias", self.bias)
        initialise(layer)

    def decisions(self) -> tuple[Decision, ...]:
        return tuple(dict.fromkeys(decisions(self.in_features) + decisions(self.out_features)))

    def settle(self, choices: Choices) -> None:
        self.__dict__["_settled"] = choices
        if self._mixed is not None:
            self._mixed = None
        self._set(size(self.in_features, choices), size(self.out_features, choices))

    def _set(self, inputs: int, outputs: int) -> None:
        self._inputs, self._outputs = inputs, outputs
        self._cut = cut(tuple(self.weight.shape), (outputs, inputs))

    def mix(self, weights: Mapping[str, Weights]) -> None:
        found = resolve(weights, self.decisions())
        no_gates(found.values(), found)
        choices = self._choices()
        self._mixed = (
            spread(self.in_features, found, choices),
            spread(self.out_features, found, choices),
        )

    def _refuse(self, x: Tensor, inputs: int) -> None:
        raise SpaceError(
            f"a linear layer declared for {inputs} features ({text(self.in_features)})"
            f" got {x.shape[-1]}: declare the features that the layer before it gives"
        )

    def _mixture(self, x: Tensor, inputs: Spread, outputs: Spread) -> Tensor:
        if x.shape[-1] != inputs.size:
            self._refuse(x, inputs.size)
        bias = None if self.bias is None else self.bias[: outputs.size]
        y = F.linear(x, self.weight[: outputs.size, : inputs.size], bias)
        return outputs.masked(y, -1) if self.masks else y

    def forward(self, x: Tensor) -> Tensor:
        if self._mixed is not None:
            return self._mixture(x, *self._mixed)
        if x.shape[-1] != self._inputs:
            self._refuse(x, self._inputs)
        if self._cut is None:
            return F.linear(x, self.weight, self.bias)
        bias = None if self.bias is None else self.bias[: self._outputs]
        return F.linear(x, self.weight[self._cut], bias)

    def plain(self, make: Maker) -> nn.Module:
        inputs = size(self.in_features, make.choices)
        outputs = size(self.out_features, make.choices)
        layer = nn.Linear(inputs, outputs, bias=self.bias is not None, device="meta")
        tensors = {"weight": self.weight[:outputs, :inputs]}
        if self.bias is not None:
            tensors["bias"] = self.bias[:outputs]
        return filled(layer, make, tensors, self)

    def extra_repr(self) -> str:
        return f"{text(self.in_features)} -> {text(self.out_features)}"


class BatchNorm2d(Elastic, nn.BatchNorm2d):
    """Batch normalisation of `(b, c, h, w)`; smaller widths share the first channels' statistics.

    The statistics of a candidate are therefore right only after they have been set for it:
    see `train.recalibrate`.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, channels: Dim, eps: float = 1e-5, momentum: float | None = 0.1) -> None:
        self._width = ends(channels, "number of channels")[1]
        super().__init__(self._width, eps=eps, momentum=momentum)
        self.channels = channels

    def decisions(self) -> tuple[Decision, ...]:
        return decisions(self.channels)

    def settle(self, choices: Choices) -> None:
        self.__dict__["_settled"] = choices
        if self._mixed is not None:
            self._mixed = None
        self._width = size(self.channels, choices)

    def mix(self, weights: Mapping[str, Weights]) -> None:
        found = resolve(weights, self.decisions())
        no_gates(found.values(), found)
        self._mixed = spread(self.channels, found, self._choices())

    def _mixture(self, x: Tensor, width: Spread) -> Tensor:
        if self.training and width.per_sample:
            scale, shift = self.weight[: width.size], self.bias[: width.size]
            y = self._centred(x.to(scale.dtype), width.size, width.mask())
            y = y * scale[:, None, None] + shift[:, None, None]
            return width.masked(y.to(x.dtype), 1)
        return width.masked(self._normalised(x, width.size), 1)

    def _centred(self, x: Tensor, n: int, mask: Tensor) -> Tensor:
        """`x` by the statistics over the samples that have a channel, which are tracked."""
        self._check(x, n)
        weight = mask[:, :, None, None].to(x.dtype)
        # channels that no sample has come out as 0, not as 0 / 0
        total = (weight.sum(0) * (x.shape[2] * x.shape[3])).clamp_min(self.eps)
        mean = (x * weight).sum((0, 2, 3), keepdim=True) / total
        var = ((x - mean).square() * weight).sum((0, 2, 3), keepdim=True) / total
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            rate = self.momentum
            rate = 1.0 / float(self.num_batches_tracked) if rate is None else rate
            had = (mask != 0).any(0) * rate
            count = total.flatten()
            unbiased = var.flatten() * count / (count - 1).clamp_min(1)
            self.running_mean[:n] += had * (mean.flatten() - self.running_mean[:n])
            self.running_var[:n] += had * (unbiased - self.running_var[:n])
        return (x - mean) * (var + self.eps).rsqrt()

    def _check(self, x: Tensor, n: int) -> None:
        if x.shape[1] != n:
            raise SpaceError(
                f"a batch norm declared for {n} channels ({text(self.channels)}) got"
                f" {x.shape[1]}: declare the channels that the layer before it gives"
            )

    def forward(self, x: Tensor) -> Tensor:
        if self._mixed is not None:
            return self._mixture(x, self._mixed)
        return self._normalised(x, self._width)

    def _normalised(self, x: Tensor, n: int) -> Tensor:
        self._check(x, n)
        if n == self.num_features:
            return super().forward(x)
        rate = self.momentum
        if self.training:
            self.num_batches_tracked.add_(1)
        if rate is None:  # torch's convention: the statistics are a plain average
            rate = 1.0 / float(self.num_batches_tracked) if self.training else 0.0
        return F.batch_norm(
            x,
            self.running_mean[:n],
            self.running_var[:n],
            self.weight[:n],
            self.bias[:n],
            self.training,
            rate,
            self.eps,
        )

    def plain(self, make: Maker) -> nn.Module:
        n = size(self.channels, make.choices)
        layer = nn.BatchNorm2d(n, eps=self.eps, momentum=self.momentum, device="meta")
        tensors = {
            "weight": self.weight[:n],
            "bias": self.bias[:n],
            "running_mean": self.running_mean[:n],
            "running_var": self.running_var[:n],
            "num_batches_tracked": self.num_batches_tracked,
        }
        return filled(layer, make, tensors, self)

    def extra_repr(self) -> str:
        return text(self.channels)


class LayerNorm(Elastic, nn.LayerNorm):
    """Layer normalisation over the last dimension of `(..., n)`."""

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, features: Dim, eps: float = 1e-5) -> None:
        self._width = ends(features, "number of features")[1]
        super().__init__(self._width, eps=eps)
        self.features = features

    def decisions(self) -> tuple[Decision, ...]:
        return decisions(self.features)

    def settle(self, choices: Choices) -> None:
        self.__dict__["_settled"] = choices
        if self._mixed is not None:
            self._mixed = None
        self._width = size(self.features, choices)

    def mix(self, weights: Mapping[str, Weights]) -> None:
        found = resolve(weights, self.decisions())
        no_gates(found.values(), found)
        self._mixed = spread(self.features, found, self._choices())

    def _mixture(self, x: Tensor, width: Spread) -> Tensor:
        n = width.size
        scale, shift = self.weight[:n], self.bias[:n]
        if len(set(width.sizes)) == 1:
            return width.masked(F.layer_norm(x, (n,), scale, shift, self.eps), -1)
        x = x.to(scale.dtype)  # statistics of halves would be poor: see torch's own under autocast
        mask = aligned(width.mask(), x, -1)
        # statistics over the channels that there are, each as much as there is of it
        total = mask.sum(-1, keepdim=True).clamp_min(self.eps)  # of none, 0 and not 0 / 0
        mean = (x * mask).sum(-1, keepdim=True) / total
        var = ((x - mean).square() * mask).sum(-1, keepdim=True) / total
        return ((x - mean) * (var + self.eps).rsqrt() * scale + shift) * mask

    def forward(self, x: Tensor) -> Tensor:
        if self._mixed is not None:
            return self._mixture(x, self._mixed)
        n = self._width
        return F.layer_norm(x, (n,), self.weight[:n], self.bias[:n], self.eps)

    def plain(self, make: Maker) -> nn.Module:
        n = size(self.features, make.choices)
        layer = nn.LayerNorm(n, eps=self.eps, device="meta")
        return filled(layer, make, {"weight": self.weight[:n], "bias": self.bias[:n]}, self)

    def extra_repr(self) -> str:
        return text(self.features)
