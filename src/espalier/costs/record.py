"""One pass of a network, written down operation by operation.

The record is taken below the network's own code, at torch's operators, so that any network can
be counted: no tracing, no assumption on how it is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from espalier.costs.shapes_alone import called
from espalier.costs.storages import storage_of, storages_of
from espalier.errors import ExportError
from espalier.export import deployed
from espalier.export.quantisers import Quantised, Quantiser

Shape = tuple[int, ...]
aten = torch.ops.aten


@dataclass
class Operation:
    """One call of an operator. `reads` and `writes` are numbers of storages, weights left out.

    `layer` is the number of the module call it belongs to, -1 outside of all leaf modules.
    `shapes` are those of all tensors it takes, weights too; `settings` the text of what else it
    takes; `pointwise` says that it could overwrite an operand of the same size.
    """

    name: str
    macs: int
    shapes: tuple[Shape, ...]
    out_shape: Shape
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    pointwise: bool
    settings: str = ""
    layer: int = -1

    @property
    def in_shape(self) -> Shape:
        """The shape of the first tensor it takes."""
        return self.shapes[0] if self.shapes else ()


@dataclass
class Layer:
    """One call of a leaf module (one without children), in order of execution."""

    name: str
    module: nn.Module
    in_shape: Shape
    out_shape: Shape = ()


@dataclass
class Record:
    """Everything one pass did. `sizes`: bytes of every storage that is not a weight."""

    operations: list[Operation] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    sizes: dict[int, int] = field(default_factory=dict)
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()


def record(network: nn.Module, example: Tensor) -> Record:
    """Runs the network once in evaluation mode and gives what it did.

    Errors: `ExportError` when the network does not run on the example.
    """
    recorder = _Recorder(network, example)
    fast = torch.backends.mha.get_fastpath_enabled()
    # the fast path of attention is one opaque operator: its products would not be seen
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with deployed(network), recorder.listening(network), recorder:
            output = network(example)
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        raise ExportError(
            f"{type(network).__name__} does not run on an input of shape "
            f"{tuple(example.shape)}: {first}"
        ) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return recorder.finished(output)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, network: nn.Module, example: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.record = Record()
        self._alive: list[Tensor] = []  # held, so that no storage's address is used twice
        self._numbers: dict[int, int] = {}
        self._weights = storages_of((*network.parameters(), *network.buffers()))
        self._layer = -1
        self.record.inputs = self._storages([example])

    @contextmanager
    def listening(self, network: nn.Module) -> Iterator[None]:
        """Notes which leaf module is running."""
        handles = []
        for name, module in network.named_modules():
            if _is_leaf(module) or isinstance(module, nn.MultiheadAttention):
                enter, leave = self._hooks(name or type(module).__name__.lower())
                handles.append(module.register_forward_pre_hook(enter))
                handles.append(module.register_forward_hook(leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hooks(self, name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def enter(module: nn.Module, args: Any) -> None:
            if self._layer < 0:
                self._layer = len(self.record.layers)
                self.record.layers.append(Layer(name, module, _shape(args)))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if self._layer >= 0 and self.record.layers[self._layer].module is module:
                self.record.layers[self._layer].out_shape = _shape(output)
                self._layer = -1

        return enter, leave

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = called(func, args, kwargs or {})
        read, made = _tensors((args, kwargs)), _tensors(out)
        if self._of_weights(read):
            self._weights |= storages_of(made)
            self._alive += made
        elif func.overloadpacket.__name__.startswith(ROUNDING):
            made = self._rounded(read[0], made[0])
        if made:
            self.record.operations.append(
                Operation(
                    name=func.overloadpacket.__name__,
                    layer=self._layer,
                    macs=macs_of(func.overloadpacket, args, made),
                    shapes=tuple(tuple(t.shape) for t in read),
                    settings=_settings((args, kwargs)),
                    out_shape=tuple(made[0].shape),
                    reads=self._storages(read),
                    writes=self._storages(made),
                    pointwise=_is_pointwise(func),
                )
            )
        return out

    def _of_weights(self, read: list[Tensor]) -> bool:
        """Whether a quantised layer works on its weight: a deployed one holds the outcome."""
        inside = self._layer >= 0 and isinstance(self.record.layers[self._layer].module, Quantised)
        return inside and all(storage_of(t) in self._weights for t in read)

    def _rounded(self, x: Tensor, made: Tensor) -> list[Tensor]:
        """A rounded tensor takes the place of what was rounded: it is not kept beside it."""
        new = storage_of(made)
        for number in self._storages([x]):
            if new is not None:
                self._numbers[new] = number
            self._alive.append(made)
        return [made]

    def _storages(self, tensors: list[Tensor]) -> tuple[int, ...]:
        found = []
        for tensor in tensors:
            place = storage_of(tensor)
            if place is None or place in self._weights:
                continue
            if place not in self._numbers:
                self._numbers[place] = len(self._numbers)
                self._alive.append(tensor)
                self.record.sizes[self._numbers[place]] = tensor.untyped_storage().nbytes()
            found.append(self._numbers[place])
        return tuple(dict.fromkeys(found))

    def finished(self, output: Any) -> Record:
        self.record.outputs = self._storages(_tensors(output))
        return self.record


_WHERE = "cpu"
ROUNDING = ("fake_quantize", "_fake_quantize")  # how the names of operators that round begin


def _is_leaf(module: nn.Module) -> bool:
    """A layer: quantisers are no layers, and no children either."""
    children = (child for child in module.children() if not isinstance(child, Quantiser))
    if isinstance(module, Quantised):
        return True
    return not isinstance(module, Quantiser) and next(children, None) is None


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _settings(tree: Any) -> str:
    """What an operator takes besides tensors, as text: strides, paddings, constants."""
    return " ".join(_setting(leaf) for leaf in tree_leaves(tree))


def _setting(leaf: Any) -> str:
    if isinstance(leaf, torch.device):
        return _WHERE  # what only has shapes is recorded as if it were there
    return "." if isinstance(leaf, Tensor) else str(leaf)


def _shape(tree: Any) -> Shape:
    tensors = _tensors(tree)
    return tuple(tensors[0].shape) if tensors else ()


_NORMS = {"native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm"}


def _is_pointwise(func: Any) -> bool:
    """Batch-norm counts as pointwise: in evaluation mode it is one multiplication and addition."""
    return torch.Tag.pointwise in func.tags or func.overloadpacket.__name__ in _NORMS


# --- multiply-accumulates of the operators that have them ------------------------------------


def _convolution(args: Any, out: Tensor) -> int:
    x, weight, transposed = args[0], args[1], bool(args[6])
    return int((x if transposed else out).numel() * math.prod(weight.shape[1:]))


def _product(left: int) -> Callable[[Any, Tensor], int]:
    """A matrix product whose left factor is argument `left` and right factor the next."""
    return lambda args, out: int(args[left].numel() * args[left + 1].shape[-1])


def _vector(args: Any, out: Tensor) -> int:
    return int(args[0].numel())


def _attention(args: Any, out: Tensor) -> int:
    query, key, value = args[:3]
    scores = math.prod(query.shape[:-1]) * key.shape[-2]
    return int(scores * (query.shape[-1] + value.shape[-1]))


_MACS: dict[str, Callable[[Any, Tensor], int]] = {
    "convolution": _convolution,
    "_convolution": _convolution,
    "mm": _product(0),
    "bmm": _product(0),
    "mv": _vector,
    "dot": _vector,
    "addmm": _product(1),
    "addmv": lambda args, out: int(args[1].numel()),
    "baddbmm": _product(1),
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention": _attention,
    "_scaled_dot_product_efficient_attention": _attention,
    "_scaled_dot_product_cudnn_attention": _attention,
}


def macs_of(packet: Any, args: Any, made: list[Tensor]) -> int:
    """Multiply-accumulates of one call of an operator; 0 for one that has none."""
    rule = _MACS.get(packet.__name__)
    return rule(args, made[0]) if rule else 0
