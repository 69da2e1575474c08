"""Following channels through one run of a model: which parameters' rows belong together.

Every dim of every parameter gets labels (see `labels`); each operation that the model runs passes
them on or joins them by its rule (see `rules`). What has no rule locks what it touches, so an
operation that nobody thought of costs decisions, never correctness.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from espalier.compress.coupling import moves, products  # noqa: F401  (they register rules)
from espalier.compress.coupling.calls import Call, Field, vector
from espalier.compress.coupling.labels import Labels
from espalier.compress.coupling.rules import Rule, rule_of
from espalier.compress.coupling.sizes import SizeRead, graphs_watched, sizes_of, value_at
from espalier.errors import EspalierError


@dataclass(frozen=True)
class Owned:
    """One dim of one parameter or buffer: where it is, and its first label."""

    owners: tuple[tuple[str, str], ...]  # (module path, attribute): several where it is shared
    dim: int
    start: int
    size: int
    rank: int


@dataclass
class Trace:
    """What one run told: labels joined, parameters' dims in the order of their first use."""

    labels: Labels = field(default_factory=Labels)
    owned: list[Owned] = field(default_factory=list)
    consumed: set[int] = field(default_factory=set)  # labels that weights contract
    attended: set[int] = field(default_factory=set)  # labels that met in products by heads
    made: set[int] = field(default_factory=set)  # labels that a table's lookup gives
    averaged: list[tuple[Tensor, set[int]]] = field(default_factory=list)
    slices: Any = field(default_factory=WeakTensorKeyDictionary)  # tensor -> dim -> sizes of parts
    sizes: list[SizeRead] = field(default_factory=list)
    ends: dict[str, tuple[list[Tensor], list[Tensor]]] = field(default_factory=dict)


class Labelling(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The mode under which a model runs once. Rules read and write its fields."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = Trace()
        self.labels = self.trace.labels
        self._fields: Any = WeakTensorKeyDictionary()
        self._owners: dict[int, list[tuple[str, str]]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            for kind in (module._parameters, module._buffers):
                for name, tensor in kind.items():
                    # whole numbers are indices and counters, not channels
                    if tensor is not None and not _whole(tensor):
                        self._owners.setdefault(id(tensor), []).append((path, name))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would load its compiler only to leave this alone: seconds

    def get(self, tensor: Any) -> list[Field]:
        """The fields of a tensor; a parameter's are made when it is first met."""
        if not isinstance(tensor, Tensor):
            return []
        if tensor not in self._fields and id(tensor) in self._owners:
            self._fields[tensor] = self._own(tensor)
        found: list[Field] = self._fields.get(tensor, [])
        return found

    def put(self, tensor: Tensor, fields: Sequence[Field]) -> None:
        """Set a tensor's fields; those that say the same as an earlier one are dropped."""
        kept: list[Field] = []
        for one in fields:
            named = self.labels.named(one.labels)
            if not named or self.labels.all_locked(one.labels):
                continue  # as good as values of no channel: what they meet is locked either way
            if not any(self._alike(one, named, other) for other in kept):
                kept.append(one)
        self._fields[tensor] = kept

    def _alike(self, one: Field, named: set[int], other: Field) -> bool:
        if self.labels.named(other.labels) != named:
            return False
        f, g = self.labels.find(one.labels), self.labels.find(other.labels)
        return bool((f == g).all())

    def _own(self, tensor: Tensor) -> list[Field]:
        owners, made = tuple(self._owners[id(tensor)]), []
        for dim, size in enumerate(tensor.shape):
            if size > 1:
                labels = self.labels.new(size)
                self.trace.owned.append(Owned(owners, dim, int(labels[0]), size, tensor.dim()))
                spread = labels.view([-1 if d == dim else 1 for d in range(tensor.dim())])
                made.append(Field(spread.expand(tensor.shape), own=True))
        return made

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        call = Call(func, tuple(args), kwargs)
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if call.name == "expand" or any(self.get(t) for t in given):
            rule = rule_of(call)
            if rule is None or not self._ruled(rule, call, out):
                self._lock(given, func, out)
        return out

    def _ruled(self, rule: Rule, call: Call, out: Any) -> bool:
        try:
            return rule(self, call, out) is not False
        except (IndexError, KeyError, RuntimeError, TypeError, ValueError):
            return False  # a form of the operation that the rule was not made for

    def read_sizes(self, path: str, node: fx.Node, out: Any) -> None:
        """Remember the sizes that a graph's node gives to dims of channels."""
        for place, dim, tensor in sizes_of(node, out):
            if value_at(node, place) == -1:
                continue
            for f in self.get(tensor):
                if dim in self.labels.named(f.labels):
                    labels = vector(f.labels, dim).clone()
                    self.trace.sizes.append(SizeRead(path, node.name, place, dim, labels))

    def _lock(self, given: list[Tensor], func: Any, out: Any) -> None:
        why = f"no rule says how {func._schema.name.split('::')[-1]} treats channels"
        for tensor in given:
            for one in self.get(tensor):
                self.labels.lock(one.labels, why)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.put(tensor, [])


def _whole(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())


def followed(model: nn.Module, example: Tensor) -> Trace:
    """Run a model once on `example` and follow its channels.

    The model is left as it was, its mode included. Errors: `EspalierError` when it does not run.
    """
    mode = Labelling(model)
    watched = graphs_watched(model, mode.read_sizes)
    with evaluated(model), _ends(model, mode), watched, plain_attention(), torch.no_grad():
        try:
            with mode:
                out = model(example)
        except EspalierError:
            raise
        except Exception as error:
            raise EspalierError(_unreadable(model, example, error)) from error
    for tensor in outputs(out):
        for one in mode.get(tensor):
            mode.labels.lock(one.labels, "the model's output")
    mode.labels.settle()
    return mode.trace


def outputs(out: Any) -> list[Tensor]:
    """The tensors that a model gives, in a tuple, a dictionary, or a record of transformers."""
    values = list(out.values()) if hasattr(out, "values") and not isinstance(out, Tensor) else out
    return [t for t in tree_leaves(values) if isinstance(t, Tensor)]


def _unreadable(model: nn.Module, example: Tensor, error: Exception) -> str:
    line = str(error).strip().split("\n")[0] or type(error).__name__
    return (
        f"{type(model).__name__} does not run on an example of shape {tuple(example.shape)}: {line}"
        "; give an example input that the model takes"
    )


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; every module's own mode afterwards."""
    before = [(module, module.training) for module in model.modules()]
    with suppress(NotImplementedError):  # an exported program: it has one mode only
        model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention as matrix products inside, so that its heads can be followed."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def _ends(model: nn.Module, mode: Labelling) -> Iterator[None]:
    """Inside, remember the labels of what goes into and comes out of every leaf module."""

    def hook(path: str) -> Any:
        def remember(module: nn.Module, given: Any, out: Any) -> None:
            kept = mode.trace.ends.setdefault(path, ([], []))  # a layer may run more than once
            for side, values in zip(kept, (given, out), strict=True):
                side += [f.labels for t in outputs(values) for f in mode.get(t)]

        return remember

    handles = [
        module.register_forward_hook(hook(path))
        for path, module in model.named_modules()
        if not any(True for _ in module.children())
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
