"""Mixtures: a supernet run with a weight on every option, in the place of one option each.

Weighted sums of operators are those of DARTS (Liu et al., 2019). Weights that are 0 cost nothing:
their options are not run, so that one-hot weights take the time and the memory of one path.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from espalier.errors import SpaceError, unknown
from espalier.nets.elastic.dims import options
from espalier.space import Decision


@dataclass(frozen=True)
class Gates:
    """Weights of a `OneOf` or `Skippable` whose options in `idle` are not run in forward.

    Their weights are 0 in value and still get the gradient they would have if all had run: backward
    runs each idle option without keeping its activations (ProxylessNAS, Cai et al., 2019).
    Leave the supernet as it is between a forward pass and its backward pass.
    """

    weights: Tensor
    idle: tuple[int, ...]


@dataclass(frozen=True)
class Mixed:
    """Weights that have been checked and looked at, once for all modules.

    `live` are the options with a weight other than 0 for some sample: those that run. `sure`: one
    option runs, with weight 1 and without a gradient for it, so there is nothing to multiply by.
    """

    weights: Tensor  # (options,) or (batch, options)
    live: tuple[int, ...]
    idle: tuple[int, ...] = ()
    sure: bool = False

    @property
    def per_sample(self) -> bool:
        """Whether each sample has weights of its own."""
        return self.weights.dim() == 2

    def times(self, index: int, x: Tensor) -> Tensor:
        """`x` times the weight of one option."""
        if self.sure:
            return x
        return x * along(self.weights[..., index], x)


Weights: TypeAlias = Tensor | Gates | Mixed
Mixture: TypeAlias = Mapping[str, Tensor | Gates]


def along(weight: Tensor, x: Tensor) -> Tensor:
    """A weight `()`, or one a sample `(batch,)`, in a shape that multiplies `x`."""
    if weight.dim() == 0:
        return weight
    check_batch(len(weight), x)
    return weight.to(x.dtype).reshape(-1, *(1,) * (x.dim() - 1))


def check_batch(batch: int, x: Tensor) -> None:
    """Refuses weights a sample that are of another batch."""
    if x.shape[0] != batch:
        raise SpaceError(
            f"a mixture with weights for {batch} samples got a batch of {x.shape[0]}: mix again"
            " for each batch"
        )


def resolve(weights: Mapping[str, Weights], decisions: Iterable[Decision]) -> dict[str, Mixed]:
    """Checks a mixture and finds what runs, with one look at the device for all of it.

    What is resolved already stays as it is. Where all weights of a decision are 0, its first
    option runs, times 0.
    Errors: `SpaceError` for an unknown decision, or weights that are not one an option.
    """
    known = {decision.name: decision for decision in decisions}
    new: dict[str, tuple[Tensor, tuple[int, ...]]] = {}
    for name, given in weights.items():
        if name not in known:
            raise SpaceError(unknown("decision", name, known))
        if not isinstance(given, Mixed):
            new[name] = _checked(given, known[name])
    values = iter(_values([tensor for tensor, _ in new.values()]))
    found: dict[str, Mixed] = {n: w for n, w in weights.items() if isinstance(w, Mixed)}
    for name, (tensor, idle) in new.items():
        found[name] = _mixed(name, tensor, idle, [next(values) for _ in range(tensor.shape[-1])])
    return {name: found[name] for name in weights}


def _checked(given: Tensor | Gates, decision: Decision) -> tuple[Tensor, tuple[int, ...]]:
    tensor, idle = (given.weights, given.idle) if isinstance(given, Gates) else (given, ())
    name, count = decision.name, len(options(decision))
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise SpaceError(f"the weights of {name!r} must be a tensor of floats, got {tensor!r}")
    wanted = (1,) if isinstance(given, Gates) else (1, 2)
    if tensor.dim() not in wanted or tensor.shape[-1] != count or 0 in tensor.shape:
        several = "" if isinstance(given, Gates) else f" or (batch, {count})"
        raise SpaceError(
            f"the weights of {name!r} have one number an option, shape ({count},){several},"
            f" got {tuple(tensor.shape)}"
        )
    return tensor, tuple(idle)


def _values(tensors: Sequence[Tensor]) -> list[float]:
    """The value of each weight, or its largest size in the batch, of all tensors in one copy."""
    if not tensors:
        return []
    flat = [t.detach() if t.dim() == 1 else t.detach().abs().amax(0) for t in tensors]
    return list(torch.cat(flat).tolist())


def _mixed(name: str, tensor: Tensor, idle: tuple[int, ...], values: list[float]) -> Mixed:
    for index in idle:
        if not 0 <= index < len(values) or values[index] != 0:
            raise SpaceError(
                f"idle options of {name!r} are indices from 0 to {len(values) - 1} of weights that"
                f" are 0, got {index} with weights {values}"
            )
    live = tuple(i for i, value in enumerate(values) if value != 0) or (0,)
    sure = tensor.dim() == 1 and not tensor.requires_grad and len(live) == 1
    return Mixed(tensor, live, idle, sure and values[live[0]] == 1)


def no_gates(mixed: Iterable[Mixed], names: Iterable[str]) -> None:
    """Refuses gates where they can't be: only whole modules can stand idle."""
    if any(m.idle for m in mixed):
        raise SpaceError(
            f"gates are for OneOf and Skippable, not for the sizes {', '.join(names)}: give a"
            " tensor of weights"
        )


def weighted(mixed: Mixed, runs: Mapping[int, nn.Module | None], x: Tensor) -> Tensor:
    """The sum of weight times module over the live options of `runs`; None gives `x` back."""
    out: Tensor | None = None
    for index in mixed.live:
        module = runs[index]
        term = mixed.times(index, x if module is None else module(x))
        out = term if out is None else added(out, term)
    assert out is not None
    if not mixed.idle or not torch.is_grad_enabled() or not mixed.weights.requires_grad:
        return out
    return gated(out, mixed.weights, x, {i: runs[i] for i in mixed.idle})


def added(a: Tensor, b: Tensor) -> Tensor:
    """The sum of two options' outputs, which must have one shape."""
    if a.shape != b.shape:
        raise SpaceError(
            f"options whose outputs differ in shape can't be mixed, got {tuple(a.shape)} and"
            f" {tuple(b.shape)}: give one of them all the weight"
        )
    return a + b


def gated(out: Tensor, weights: Tensor, x: Tensor, idle: Mapping[int, nn.Module | None]) -> Tensor:
    """`out`, which is changed in place so that backward also finds the gradients of idle options."""
    result: Tensor = _Idle.apply(out, weights, x, idle)  # type: ignore[no-untyped-call]
    return result


class _Idle(torch.autograd.Function):
    """Does nothing in forward; in backward runs idle options for the gradient of their weights."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, weights: Tensor, x: Tensor, idle: Mapping[int, nn.Module | None]
    ) -> Tensor:
        ctx.mark_dirty(out)
        ctx.save_for_backward(x)
        ctx.idle, ctx.like = idle, (weights.shape, weights.dtype)
        device = x.device.type
        ctx.cast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (x,) = ctx.saved_tensors
        shape, dtype = ctx.like
        found = torch.zeros(shape, dtype=dtype, device=gradient.device)
        device, half, enabled = ctx.cast
        with torch.no_grad(), torch.autocast(device, dtype=half, enabled=enabled):
            for index, module in ctx.idle.items():
                output = x if module is None else module(x)
                found[index] = (gradient * output).sum(dtype=dtype)
        return gradient, found, None, None
