"""What a proof runs: the model in float64 where it can, on noise beside the example.

A cut that is wrong by little hides behind the rounding of half floats, and any hides behind an
example of zeros.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from espalier.compress.coupling.labelling import evaluated, outputs


@dataclass(frozen=True)
class Trial:
    """A model and the inputs on which cuts of it are tried; `eps` is the coarsest rounding in it."""

    model: nn.Module
    inputs: tuple[Tensor, ...]
    eps: float = 0.0

    @cached_property
    def given(self) -> list[Tensor]:
        """What the model itself gives."""
        return self.run(self.model)

    def run(self, network: nn.Module) -> list[Tensor]:
        """What a network gives for all inputs."""
        with evaluated(network), torch.no_grad():
            return [out for x in self.inputs for out in outputs(network(x))]

    def same(self, found: list[Tensor], expected: list[Tensor]) -> bool:
        """Whether two networks' outputs are the same up to rounding."""
        return all(close(a, b, self.eps) for a, b in zip(found, expected, strict=True))


def trial_of(model: nn.Module, example: Tensor) -> Trial:
    """The model as it is tried: with noise and in float64, each where it runs so."""
    plain = Trial(model, (example,))
    noisy = Trial(model, _with_noise(example))
    return _precise(noisy if _as_sound(noisy, plain) else plain)


def close(a: Tensor, b: Tensor, eps: float = 0.0) -> bool:
    """Whether two outputs are the same up to the rounding of their type, or a coarser one."""
    if not a.is_floating_point() or not b.numel():
        return True
    largest = b.abs().nan_to_num(posinf=0).max().item()
    margin = 10 * max(eps, torch.finfo(a.dtype).eps) ** 0.5 * largest + 1e-30
    return torch.allclose(a, b, rtol=0, atol=margin, equal_nan=True)


def _precise(trial: Trial) -> Trial:
    """In float64; as it is where it then does not run, or not to the same."""
    try:
        inputs = tuple(x.double() if x.is_floating_point() else x for x in trial.inputs)
        twin = Trial(_doubled(trial.model), inputs)
        with _Roundings() as roundings:
            found = list(twin.given)
        alike = [f.shape for f in found] == [g.shape for g in trial.given]
        rounded = [f.to(g.dtype) for f, g in zip(found, trial.given, strict=True)]
        if alike and trial.same(rounded, trial.given):
            return replace(twin, eps=roundings.eps)
    except Exception:  # float32 is written in a user's code: what it mixes with must be float32
        pass
    return trial


def _doubled(model: nn.Module) -> nn.Module:
    """A copy in float64; tensors that modules share stay shared."""
    twins: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            double = tensor.detach().double()
            learned = isinstance(tensor, nn.Parameter)
            twins[id(tensor)] = nn.Parameter(double, tensor.requires_grad) if learned else double
    return copy.deepcopy(model, twins)


class _Roundings(TorchDispatchMode):
    """Remembers the coarsest rounding of finer values: a norm that computes in float32."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.eps = 0.0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would load its compiler only to leave this alone: seconds

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given, made = _roundings((args, kwargs)), _roundings(out)
        if given and made and min(given) < max(made):
            self.eps = max(self.eps, *made)
        return out


def _roundings(values: Any) -> list[float]:
    """The rounding of each tensor that has one."""
    tensors = [t for t in tree_leaves(values) if isinstance(t, Tensor)]
    return [torch.finfo(t.dtype).eps for t in tensors if t.is_floating_point() or t.is_complex()]


def _with_noise(example: Tensor) -> tuple[Tensor, ...]:
    """Noise in place of half the example's rows, which takes no longer; beside an only one."""
    if not example.is_floating_point() or not example.numel() or not example.isfinite().all():
        return (example,)
    rng = torch.Generator().manual_seed(0)
    low, high = (float(x) for x in example.aminmax())
    if low < high:  # within the example's range: there may be logarithms, or indices
        noise = low + (high - low) * torch.rand(example.shape, generator=rng)
    else:
        noise = low + (abs(low) or 1.0) * torch.randn(example.shape, generator=rng)
    noise = noise.to(example)
    half = len(example) // 2
    return (torch.cat([example[half:], noise[:half]]),) if half else (example, noise)


def _as_sound(noisy: Trial, plain: Trial) -> bool:
    """Whether the model runs on noise and gives numbers, if it gives numbers for the example."""
    try:
        return _numbers_only(noisy.given) or not _numbers_only(plain.given)
    except Exception:  # whatever a model demands of its input
        return False


def _numbers_only(values: list[Tensor]) -> bool:
    return not any(bool(v.isnan().any()) for v in values)
