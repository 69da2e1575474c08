"""Pieces of a model made to stand alone."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from espalier.compress.calls import Call, Shape
from espalier.costs.rows import Rows


class AsCalled(nn.Module):
    """A module called as it was in its model: with `x` anew, all else as constants.

    It gives the first tensor of what the module gives. Constants that have one row where `x` had one, in
    its dim `dim`, have as many as it: keys and values beside queries.
    """

    def __init__(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        x: Tensor,
        dim: int = 0,
    ) -> None:
        super().__init__()
        self.module, self._dim, self._dims = module, dim, x.dim()
        self._constants: list[str] = []
        self._template = tree_map(lambda leaf: self._stored(leaf, x), (args, dict(kwargs)))

    def _stored(self, leaf: Any, x: Tensor) -> Any:
        if leaf is x:
            return _X
        if not isinstance(leaf, Tensor):
            return leaf
        name = f"constant{len(self._constants)}"
        self._constants.append(name)
        self.register_buffer(name, leaf.detach(), persistent=False)
        return _Constant(name)

    def forward(self, x: Tensor) -> Tensor:
        def filled(leaf: Any) -> Any:
            if leaf is _X or isinstance(leaf, _Here):
                return x
            return self._rows(getattr(self, leaf.name), x) if isinstance(leaf, _Constant) else leaf

        args, kwargs = tree_map(filled, self._template)
        output = self.module(*args, **kwargs)
        first: Tensor = next(t for t in tree_leaves(output) if isinstance(t, Tensor))
        return first

    def _rows(self, constant: Tensor, x: Tensor) -> Tensor:
        dim = self._dim
        if constant.dim() != self._dims or constant.shape[dim] != 1 or x.shape[dim] == 1:
            return constant
        return constant.repeat_interleave(x.shape[dim], dim)


class _Constant:
    def __init__(self, name: str) -> None:
        self.name = name


class _Here:
    """Where `x` goes; a class, because copies of it must still be known."""


_X = _Here()


class Held(nn.Module):
    """Weights that belong to no layer: they count, and nothing runs."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        for name, parameter in owner._parameters.items():
            self.register_parameter(name, parameter)
        for name, buffer in owner._buffers.items():
            self.register_buffer(name, buffer, name not in owner._non_persistent_buffers_set)

    def forward(self, x: Tensor) -> Tensor:
        return x


def main_tensor(call: Call) -> Tensor:
    """The tensor that a call is about: its first of floating numbers, or its first."""
    tensors = [t for t in tree_leaves((call.args, dict(call.kwargs))) if isinstance(t, Tensor)]
    return next((t for t in tensors if t.is_floating_point()), tensors[0])


def fed(module: nn.Module, shape: Shape, dim: int = 0) -> tuple[nn.Module, Shape]:
    """A module and its input's shape at batch 1 -> a piece and its input's shape without the batch.

    `dim` is where the batch stands; other rows beside it stay in the piece's input.
    """
    return (module, shape[1:]) if shape[:1] in ((), (1,)) else (Rows(module, dim), shape)


def borrowed(module: nn.Module, names: Sequence[str]) -> nn.Module:
    """A copy of a module in which these parameters are buffers that are not saved."""
    twin = copy.deepcopy(module)
    for name in names:
        path, _, last = name.rpartition(".")
        holder = twin.get_submodule(path)
        weight = holder._parameters.pop(last)
        assert weight is not None
        holder.register_buffer(last, weight.detach(), persistent=False)
    return twin


def emptied(before: nn.Module, after: nn.Module) -> bool:
    """Whether a module that held weights holds none any more: it was left out."""
    return any(True for _ in before.parameters()) and not any(True for _ in after.parameters())


def tied(model: nn.Module) -> frozenset[str]:
    """The names of parameters that the model has under an earlier name too."""
    seen: set[int] = set()
    found = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in seen:
            found.append(name)
        seen.add(id(parameter))
    return frozenset(found)
