"""Which channels matter: scores of each unit of each group of coupled channels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from espalier.compress.calls import first_given
from espalier.compress.coupling.groups import Group, Member
from espalier.errors import EspalierError, unknown

KINDS = ("taylor", "magnitude", "bn", "activation")
Batches = Iterable[tuple[Tensor, Tensor]]
Loss = Callable[..., Tensor]


def scores(
    model: nn.Module,
    groups: Mapping[str, Group],
    kind: str = "magnitude",
    batches: Batches | None = None,
    loss: Loss | None = None,
) -> dict[str, Tensor]:
    """The importance of every unit `(units,)`, by group; higher stays longer.

    - "magnitude": L2 norm over all weights of the unit, each tensor's mean of squares.
    - "bn": the mean |gamma| of the unit's norms; magnitude in groups without a norm (Liu et al.,
      Learning Efficient Convolutional Networks through Network Slimming, 2017).
    - "taylor": |sum of weight times gradient of the loss| over the unit, mean of batches
      (Molchanov et al., Importance Estimation for Neural Network Pruning, 2019).
    - "activation": |weight| times the norm of its input, summed over the layers that read the unit
      (Sun et al., A Simple and Effective Pruning Approach for LLMs, 2023, here by channel).

    `batches` are (inputs, targets); "activation" reads inputs only. The model is left as it was.
    Errors: `EspalierError` for an unknown kind, and for data that is missing.
    """
    if kind not in KINDS:
        raise EspalierError(unknown("importance", kind, KINDS))
    if kind in ("taylor", "activation") and batches is None:
        raise EspalierError(f"importance {kind!r} needs data: give batches, or take 'magnitude'")
    if kind == "taylor":
        return _taylor(model, groups, batches or (), loss or nn.functional.cross_entropy)
    if kind == "activation":
        return _activation(model, groups, batches or ())
    return {name: _plain(model, group, kind) for name, group in groups.items()}


def _plain(model: nn.Module, group: Group, kind: str) -> Tensor:
    norms = [m for m in group.members if m.tensor == "weight" and _is_norm(model, m)]
    if kind == "bn" and norms:
        return torch.stack([by_unit(_values(model, m).abs(), m).float() for m in norms]).mean(0)
    weights = [m for m in group.members if m not in norms and _values(model, m).dim() > 1]
    squares = [by_unit(_values(model, m).float() ** 2, m) for m in weights or group.members]
    return torch.stack(squares).sum(0).sqrt()


def _is_norm(model: nn.Module, member: Member) -> bool:
    norms = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
    return isinstance(model.get_submodule(member.path), norms)


def _values(model: nn.Module, member: Member) -> Tensor:
    found: Tensor = getattr(model.get_submodule(member.path), member.tensor).detach()
    return found


def by_unit(values: Tensor, member: Member, mean: bool = True) -> Tensor:
    """A member's values summed up for each unit `(units,)`: their mean, or their sum."""
    rows = values.movedim(member.dim, 0).flatten(1) if values.dim() > 1 else values[:, None]
    rows = rows.mean(1) if mean else rows.sum(1)
    found = rows[member.rows.to(values.device)]
    return (found.mean(1) if mean else found.sum(1)).cpu()


def _taylor(
    model: nn.Module, groups: Mapping[str, Group], batches: Batches, loss: Loss
) -> dict[str, Tensor]:
    found = {name: torch.zeros(group.units) for name, group in groups.items()}
    members = {
        name: [m for m in g.members if m.tensor in model.get_submodule(m.path)._parameters]
        for name, g in groups.items()
    }
    tensors = {(m.path, m.tensor) for ms in members.values() for m in ms}
    weights = [getattr(model.get_submodule(path), name) for path, name in tensors]
    count = 0
    with _calm(model), torch.enable_grad():
        for inputs, targets in batches:
            for w in weights:
                w.requires_grad_(True)
            value = loss(model(inputs.contiguous()), targets)
            grads = torch.autograd.grad(value, weights, allow_unused=True)
            by = dict(zip(tensors, grads, strict=True))
            for name, group in members.items():
                total = torch.zeros_like(found[name])
                for m in group:
                    grad = by[m.path, m.tensor]
                    if grad is not None:
                        total += by_unit((_values(model, m) * grad).float(), m, mean=False)
                found[name] += total.abs()
            count += 1
    if not count:
        raise EspalierError("importance 'taylor' needs at least one batch, got none")
    return {name: total / count for name, total in found.items()}


@contextmanager
def _calm(model: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards each module's mode and each parameter's requires_grad are as before."""
    modes = [(m, m.training) for m in model.modules()]
    wants = [(p, p.requires_grad) for p in model.parameters()]
    model.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training
        for p, want in wants:
            p.requires_grad_(want)


def _activation(
    model: nn.Module, groups: Mapping[str, Group], batches: Batches
) -> dict[str, Tensor]:
    readers = {
        name: [m for m in g.members if m.consumed and m.tensor == "weight" and _reads(model, m)]
        for name, g in groups.items()
    }
    squares = _input_squares(model, {m.path for ms in readers.values() for m in ms}, batches)
    found = {}
    for name, members in readers.items():
        met = [m for m in members if m.path in squares]
        total = torch.zeros(groups[name].units)
        for m in met:
            weight = _values(model, m).float().abs()
            shape = [-1 if d == m.dim else 1 for d in range(weight.dim())]
            total += by_unit(weight * squares[m.path].sqrt().view(shape), m)
        found[name] = total if met else _plain(model, groups[name], "magnitude")
    return found


def _reads(model: nn.Module, member: Member) -> bool:
    return isinstance(model.get_submodule(member.path), (nn.Linear, nn.modules.conv._ConvNd))


def _input_squares(model: nn.Module, paths: set[str], batches: Batches) -> dict[str, Tensor]:
    """For each layer the sum of squares of its input by the channel that its weights see."""
    squares: dict[str, Tensor] = {}

    def hook(path: str) -> Callable[..., None]:
        def remember(module: nn.Module, args: Any, kwargs: Any) -> None:
            x = first_given(args, kwargs).detach().float()
            conv = isinstance(module, nn.modules.conv._ConvNd)
            channel = 1 if conv else x.dim() - 1
            total = (x**2).sum([d for d in range(x.dim()) if d != channel])
            if isinstance(module, nn.modules.conv._ConvNd) and not module.transposed:
                total = total.view(module.groups, -1).sum(0)
            squares[path] = squares.get(path, torch.zeros_like(total)) + total

        return remember

    handles = [
        model.get_submodule(p).register_forward_pre_hook(hook(p), with_kwargs=True)
        for p in sorted(paths)
    ]
    count = 0
    try:
        with _calm(model), torch.no_grad():
            for inputs, _ in batches:
                model(inputs.contiguous())
                count += 1
    finally:
        for handle in handles:
            handle.remove()
    if not count:
        raise EspalierError("importance 'activation' needs at least one batch, got none")
    return squares
