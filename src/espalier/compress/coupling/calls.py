"""One call of an operation, and what its tensors carry; helpers that rules share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor

from espalier.compress.coupling.labels import Labels

TABLE = "rows of a table are looked up by their index"
KERNEL = "places of a kernel"
INPUT = "joined with the model's input, or with values of no channel"


@dataclass(frozen=True)
class Field:
    """Labels in the shape of their tensor; `own` while the tensor is a parameter, or its view."""

    labels: Tensor
    own: bool = False


@dataclass(frozen=True)
class Call:
    """An operation of torch with its arguments."""

    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @cached_property
    def named(self) -> dict[str, Any]:
        """The arguments given, by their names in the operation's schema."""
        names = [a.name for a in self.func._schema.arguments]
        return {**dict(zip(names, self.args, strict=False)), **self.kwargs}

    @property
    def name(self) -> str:
        """The operation's name without overload: "add", "relu_"."""
        name: str = self.func._schema.name
        return name.split("::")[-1]

    def __getitem__(self, name: str) -> Any:
        return self.named[name]

    def get(self, name: str, default: Any = None) -> Any:
        """An argument, or the default where it was not given."""
        return self.named.get(name, default)

    def again(self, first: Any) -> Any:
        """The operation's result with another first argument."""
        return self.func(first, *self.args[1:], **self.kwargs)


class Mode(Protocol):
    """What rules see of the run that is followed (`labelling.Labelling`)."""

    labels: Labels
    trace: Any

    def get(self, tensor: Any) -> list[Field]: ...

    def put(self, tensor: Tensor, fields: Sequence[Field]) -> None: ...


def results(out: Any) -> list[Tensor]:
    """The tensors that an operation gave."""
    return [out] if isinstance(out, Tensor) else [t for t in out if isinstance(t, Tensor)]


def vector(field: Tensor, dim: int) -> Tensor:
    """The labels of a field along one dim, at the first place of the others."""
    index = tuple(slice(None) if d == dim % field.dim() else 0 for d in range(field.dim()))
    return field[index]


def along(labels: Tensor, dim: int, shape: Sequence[int]) -> Tensor:
    """A vector of labels as a field of `shape` that varies along `dim`."""
    view = [1] * len(shape)
    view[dim % len(shape)] = -1
    return labels.reshape(view).expand(tuple(shape))


def spread(mode: Mode, field: Tensor, shape: Sequence[int]) -> Tensor:
    """A field at another size of the dims along which it doesn't vary."""
    for dim in set(range(field.dim())) - mode.labels.named(field):
        field = field.narrow(dim, 0, 1)
    return field.expand(tuple(shape))


def met(mode: Mode, given: Sequence[Tensor], shape: Sequence[int]) -> list[Field]:
    """The fields of tensors that are broadcast to `shape` and meet there, place by place."""
    sides = []
    for tensor in given:
        pad = len(shape) - tensor.dim()
        real = {d + pad for d, n in enumerate(tensor.shape) if n > 1}
        sides.append(([f.labels.expand(tuple(shape)) for f in mode.get(tensor)], real))
    for i, (one, real) in enumerate(sides):
        for two, other in sides[i + 1 :]:
            couple(mode, one, real, two, other)
    return [Field(f) for fields, _ in sides for f in fields]


def couple(
    mode: Mode, one: list[Tensor], real: set[int], two: list[Tensor], other: set[int]
) -> None:
    """Join the fields of two tensors in one shape; `real` and `other` are the dims in which each
    has values of its own and is not broadcast."""
    labels = mode.labels
    for f in one:
        for g in two:
            if labels.named(f) & labels.named(g):
                labels.same(f, g)
    for fields, against, dims in ((one, two, other), (two, one, real)):
        covered = set().union(*(labels.named(g) for g in against))
        for f in fields:
            labels.fixed(f, (labels.named(f) & dims) - covered, INPUT)
