"""Training on N:M sparse weights in both directions (BDWP, Fang et al., 2023).

Of every M weights along the inputs of a layer the N largest run forward; of every M along its outputs the
N largest carry the gradient back to its input. Both passes sum over runs of M with N left, which sparse
multipliers skip. The gradient of the weights themselves is dense and reaches all of them, so that any
can come back. With `backward=False` only the forward pass is sparse: SR-STE (Zhou et al., 2021), whose
decay pulls weights that do not run towards 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from espalier.errors import EspalierError


@dataclass(frozen=True)
class TwoWay:
    """`kept` weights of every `of` run. `decay`: of weights that do not run forward, as SR-STE's."""

    kept: int = 2
    of: int = 8
    backward: bool = True
    decay: float = 2e-4

    def __post_init__(self) -> None:
        if not 1 <= self.kept < self.of:
            raise EspalierError(
                f"a pattern keeps 1 or more of every M weights, fewer than M; got {self.kept}:{self.of}"
            )
        if self.decay < 0:
            raise EspalierError(f"the decay of a pattern must be 0 or more, got {self.decay!r}")

    def fits(self, layer: nn.Module) -> bool:
        """Whether inputs and outputs of a layer come in whole runs, of a group of their own."""
        if isinstance(layer, nn.Linear):
            return layer.in_features % self.of == 0 and layer.out_features % self.of == 0
        if type(layer) is nn.Conv2d or isinstance(layer, _Conv2d):
            whole = layer.in_channels % self.of == 0 and layer.out_channels % self.of == 0
            return whole and layer.groups == 1 and layer.padding_mode == "zeros"
        return False


def pattern(weight: Tensor, kept: int, of: int, dim: int) -> Tensor:
    """1 for the `kept` largest magnitudes of every `of` along a dimension, else 0; no gradient."""
    with torch.no_grad():
        moved = weight.detach().abs().movedim(dim, -1)
        runs = moved.reshape(*moved.shape[:-1], -1, of)
        mask = torch.zeros_like(runs).scatter_(-1, runs.topk(kept, -1).indices, 1.0)
        return mask.reshape(moved.shape).movedim(-1, dim)


def two_way(model: nn.Module, settings: TwoWay | None = None) -> list[str]:
    """Makes the layers of a model that the pattern fits train on it, in place; gives their paths.

    The weights stay the model's own parameters. Errors: `EspalierError` where it fits none.
    """
    settings = settings or TwoWay()
    found = []
    for path, module in list(model.named_modules()):
        if type(module) in (nn.Conv2d, nn.Linear) and settings.fits(module):
            module.__class__ = _Conv2d if isinstance(module, nn.Conv2d) else _Linear
            module.pattern = settings
            found.append(path)
    if not found:
        raise EspalierError(
            f"no layer has inputs and outputs in runs of {settings.of}: give a smaller M"
        )
    return found


def plain(model: nn.Module) -> None:
    """Makes the layers torch's own again, in place, holding the weights that run forward."""
    for module in model.modules():
        if isinstance(module, (_Conv2d, _Linear)):
            settings = module.pattern
            with torch.no_grad():
                module.weight.mul_(pattern(module.weight, settings.kept, settings.of, 1))
            del module.pattern
            own: Any = nn.Conv2d if isinstance(module, nn.Conv2d) else nn.Linear
            module.__class__ = own


class _Conv2d(nn.Conv2d):
    pattern: TwoWay

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        how = (list(self.stride), _ints(self.padding), list(self.dilation))
        out: Tensor = _Product.apply(x, weight, self.pattern, how)  # type: ignore[no-untyped-call]
        return out if self.bias is None else out + self.bias.reshape(1, -1, 1, 1)


class _Linear(nn.Linear):
    pattern: TwoWay

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        out: Tensor = _Product.apply(x, weight, self.pattern, None)  # type: ignore[no-untyped-call]
        return out if self.bias is None else out + self.bias


class _Product(torch.autograd.Function):
    """The layer without its bias: one pattern forward, another for the input's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, settings: TwoWay, how: Any) -> Tensor:
        mask = pattern(weight, settings.kept, settings.of, 1)
        ctx.save_for_backward(x, weight, mask)
        ctx.settings, ctx.how = settings, how
        if how is None:
            return functional.linear(x, weight * mask)
        return functional.conv2d(x, weight * mask, None, *how)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (g,) = grads
        x, weight, mask = ctx.saved_tensors
        settings: TwoWay = ctx.settings
        if settings.backward:
            back = weight * pattern(weight, settings.kept, settings.of, 0)
        else:
            back = weight * mask
        if ctx.how is None:
            to_x = g @ back
            to_weight = g.flatten(0, -2).T @ x.flatten(0, -2)
        else:
            to_x, to_weight = _conv_backward(g, x, back, ctx.how)
        return to_x, to_weight + settings.decay * (1 - mask) * weight, None, None


def _conv_backward(g: Tensor, x: Tensor, weight: Tensor, how: Any) -> tuple[Tensor, Tensor]:
    stride, padding, dilation = how
    to_x, to_weight, _ = torch.ops.aten.convolution_backward(
        g, x, weight, None, stride, padding, dilation, False, [0, 0], 1, [True, True, False]
    )
    return to_x, to_weight


def _ints(padding: Any) -> list[int]:
    if isinstance(padding, str):
        raise EspalierError(f"two_way needs padding in numbers, got {padding!r}")
    return list(padding)
