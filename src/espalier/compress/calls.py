"""One pass of a model, call by call: which module made what, and who read it.

Taken below the model's own code, so that no model has to be traceable. A value is one state of
one storage: views share it, and an operation in place makes a new one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from espalier.costs.record import macs_of
from espalier.costs.shapes_alone import AsOnProcessor, called
from espalier.costs.storages import storage_of, storages_of
from espalier.errors import EspalierError
from espalier.export import deployed
from espalier.export.modes import plain_attention

Shape = tuple[int, ...]
Value = tuple[int, int]


@dataclass
class Call:
    """One call of a module. `taken` and `made` are the values of its first input and output."""

    path: str
    module: nn.Module
    parent: int
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    output: Any = None
    taken: Value | None = None
    made: Value | None = None
    shape: Shape = ()
    out_shape: Shape = ()

    @property
    def single(self) -> bool:
        """Whether it takes one tensor and gives one."""
        return (
            len(self.args) == 1
            and not self.kwargs
            and isinstance(self.args[0], Tensor)
            and isinstance(self.output, Tensor)
        )


@dataclass(frozen=True)
class Step:
    """One operation that computes something: `call` is the innermost call it belongs to."""

    name: str
    call: int
    macs: int
    reads: tuple[Value, ...]
    made: Value | None
    shapes: tuple[Shape, ...]
    out_shape: Shape


@dataclass
class Pass:
    """All calls in the order they began, the root's first, and all operations in order."""

    calls: list[Call] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    output: Any = None

    def of(self, path: str) -> list[Call]:
        """The calls of one module."""
        return [call for call in self.calls if call.path == path]

    def readers(self, value: Value | None) -> list[int]:
        """Indices of the steps that read a value."""
        return [i for i, step in enumerate(self.steps) if value in step.reads]

    def within(self, call: int, outer: int) -> bool:
        """Whether a call is another or runs inside it."""
        while call != outer and call >= 0:
            call = self.calls[call].parent
        return call == outer


def follow(model: nn.Module, example: Tensor, steps: bool = True) -> Pass:
    """Runs a model once in evaluation mode and writes down its calls.

    Without `steps` the operations of tensors with values are not, which is quicker. Errors: `EspalierError` where it does not run on the example.
    """
    follower = _Follower(model)
    try:
        mode = follower if steps or example.is_meta else nullcontext()
        attention = AsOnProcessor() if example.is_meta else nullcontext()
        with plain_attention(), deployed(model), follower.listening(model), attention, mode:
            follower.run.output = model(example)
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise EspalierError(
            f"{type(model).__name__} does not run on an example of shape "
            f"{tuple(example.shape)} and {example.dtype}: {first}"
        ) from error
    return follower.run


class _Follower(TorchDispatchMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.run = Pass()
        self._stack: list[int] = []
        self._alive: list[Tensor] = []  # held, so that no storage's address is used twice
        self._states: dict[int | None, int] = {}
        self._weights = storages_of((*model.parameters(), *model.buffers()))

    @contextmanager
    def listening(self, model: nn.Module) -> Iterator[None]:
        """Notes where each module's call begins and ends."""
        handles = []
        for path, module in model.named_modules():
            handles.append(
                module.register_forward_pre_hook(self._enter(path), with_kwargs=True, prepend=False)
            )
            handles.append(module.register_forward_hook(self._leave, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, path: str) -> Any:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            call = Call(path, module, self._stack[-1] if self._stack else -1, args, dict(kwargs))
            tensors = _tensors((args, kwargs))
            if tensors:
                call.taken, call.shape = self._value(tensors[0]), tuple(tensors[0].shape)
            self._stack.append(len(self.run.calls))
            self.run.calls.append(call)

        return enter

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = self.run.calls[self._stack.pop()]
        call.output = output
        tensors = _tensors(output)
        if tensors:
            call.made, call.out_shape = self._value(tensors[0]), tuple(tensors[0].shape)

    def _value(self, tensor: Tensor) -> Value | None:
        place = storage_of(tensor)
        if place is None or place in self._weights:
            return None
        if place not in self._states:
            self._states[place] = 0
            self._alive.append(tensor)
        return place, self._states[place]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        read = _tensors((args, kwargs or {}))
        values = [self._value(t) for t in read]
        out = called(func, args, kwargs or {})
        made = _tensors(out)
        if not made:
            return out
        # (what only turns a tensor's shape in place changes no value)
        if func._schema.is_mutable and torch.Tag.inplace_view not in func.tags:
            for tensor in made:
                place = storage_of(tensor)
                if place in self._states:
                    self._states[place] += 1
        new = self._value(made[0])
        if new is None or new not in values:  # a view computes nothing
            self.run.steps.append(
                Step(
                    func.overloadpacket.__name__.rstrip("_"),
                    self._stack[-1] if self._stack else -1,
                    macs_of(func.overloadpacket, args, made),
                    tuple(v for v in values if v is not None),
                    new,
                    tuple(tuple(t.shape) for t in read),
                    tuple(made[0].shape),
                )
            )
        return out


def first_given(args: Any, kwargs: Mapping[str, Any]) -> Tensor:
    """The first tensor that a module is called with, by place or by keyword."""
    return _tensors((args, kwargs))[0]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
