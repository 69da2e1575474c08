"""An ONNX file as a torch module: the operators of convolutional and fully connected networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, fx, nn
from torch.nn import functional

from espalier.errors import DataError, unknown

Attributes = dict[str, Any]


def from_onnx(path: Path) -> nn.Module:
    """The graph of an ONNX file with torch's layers for what has weights, in evaluation mode.

    One input and one output, floats. Errors: `DataError` for a file that is none, or an operator
    that has no counterpart here (it is named).
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
        onnx.checker.check_model(model)
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"can't read {path} as an ONNX file: {first[:160]}") from error
    return _Rebuilt(model.graph).module()


class _Rebuilt:
    """One graph, node by node. A value is a node of the new graph, or a constant tensor."""

    def __init__(self, source: Any) -> None:
        self.source = source
        self.root, self.graph = nn.Module(), fx.Graph()
        self.values: dict[str, Any] = {"": None}
        for tensor in source.initializer:
            self.values[tensor.name] = _tensor(tensor)
        self.weights = {t.name for t in source.initializer}

    def module(self) -> nn.Module:
        inputs = [i.name for i in self.source.input if i.name not in self.weights]
        outputs = [o.name for o in self.source.output]
        if len(inputs) != 1 or len(outputs) != 1:
            raise DataError(
                f"a model has one input and one output, this file has {len(inputs)} and "
                f"{len(outputs)}"
            )
        self.values[inputs[0]] = self.graph.placeholder("input")
        for i, node in enumerate(self.source.node):
            self.values[node.output[0]] = self.made(node, node.name or f"{node.op_type}_{i}")
        self.graph.output(self.node(self.values[outputs[0]]))
        return fx.GraphModule(self.root, self.graph).eval()

    def made(self, node: Any, name: str) -> Any:
        given = [self.values[n] for n in node.input]
        more = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Constant":
            return _tensor(more["value"])
        if node.op_type in _LAYERS and isinstance(given[1], Tensor):
            layer = _LAYERS[node.op_type](given, more)
            path = _path(node.input[1], name)
            return self.graph.call_module(self.put(path, layer), (self.node(given[0]),))
        if node.op_type not in _CALLS:
            raise DataError(unknown("ONNX operator", node.op_type, [*_LAYERS, *_CALLS]))
        if all(v is None or isinstance(v, Tensor) for v in given):
            return _CALLS[node.op_type](given, more)  # constants are computed now
        # calls on proxies write themselves into the graph, as torch's own functions
        found = _CALLS[node.op_type]([self.proxy(v) for v in given], more)
        return found.node

    def proxy(self, value: Any) -> Any:
        """What a call can take: whole numbers are shapes and axes, and stay as they are."""
        if value is None or (isinstance(value, Tensor) and not value.is_floating_point()):
            return value
        return fx.Proxy(self.node(value))

    def node(self, value: Any) -> Any:
        """A constant becomes a buffer of the module."""
        if not isinstance(value, Tensor):
            return value
        name = f"constant_{sum(1 for _ in self.root.buffers(recurse=False))}"
        self.root.register_buffer(name, value)
        return self.graph.get_attr(name)

    def put(self, path: str, layer: nn.Module) -> str:
        parent, parts = self.root, path.split(".")
        for part in parts[:-1]:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        while hasattr(parent, parts[-1]):
            parts[-1] += "_"
        parent.add_module(parts[-1], layer.eval())
        return ".".join(parts)


def _tensor(proto: Any) -> Tensor:
    return torch.from_numpy(numpy_helper.to_array(proto).copy())


def _path(weight: str, name: str) -> str:
    """The layer's old name, where the weight tells it."""
    base = weight.removesuffix(".weight") if weight.endswith(".weight") else name
    return ".".join(p for p in base.replace("/", ".").replace(":", "_").split(".") if p) or "layer"


# --- layers with weights -----------------------------------------------------------------------


def _convolution(given: Sequence[Any], more: Attributes) -> nn.Module:
    weight, bias = given[1], given[2] if len(given) > 2 else None
    dims = weight.dim() - 2
    groups = int(more.get("group", 1))
    kind: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    pads = list(more.get("pads", [0] * 2 * dims))
    if more.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise DataError(
            "an ONNX convolution with auto_pad can't be read: export with explicit pads"
        )
    if pads[:dims] != pads[dims:]:
        raise DataError(f"an ONNX convolution with uneven pads {pads} can't be read")
    layer = kind(
        weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]),
        tuple(more.get("strides", [1] * dims)), tuple(pads[:dims]),
        tuple(more.get("dilations", [1] * dims)), groups, bias is not None,
    )  # fmt: skip
    return _filled(layer, weight=weight, bias=bias)


def _gemm(given: Sequence[Any], more: Attributes) -> nn.Module:
    weight, bias = given[1].float(), given[2] if len(given) > 2 else None
    if more.get("transA", 0) or (bias is not None and not isinstance(bias, Tensor)):
        raise DataError("an ONNX Gemm with transA or a computed bias can't be read")
    weight = (weight if more.get("transB", 0) else weight.T) * more.get("alpha", 1.0)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    return _filled(
        layer, weight=weight, bias=None if bias is None else bias * more.get("beta", 1.0)
    )


def _matmul(given: Sequence[Any], more: Attributes) -> nn.Module:
    if given[1].dim() != 2:
        raise DataError("an ONNX MatMul with a constant of more than 2 dimensions can't be read")
    return _gemm(given[:2], {})


def _batch_norm(given: Sequence[Any], more: Attributes) -> nn.Module:
    layer = nn.BatchNorm2d(len(given[1]), eps=more.get("epsilon", 1e-5))
    names = ("weight", "bias", "running_mean", "running_var")
    return _filled(layer, **dict(zip(names, given[1:5], strict=True)))


def _filled(layer: nn.Module, **tensors: Tensor | None) -> nn.Module:
    with torch.no_grad():
        for name, tensor in tensors.items():
            if tensor is not None:
                getattr(layer, name).copy_(tensor)
    return layer


_LAYERS: dict[str, Callable[[Sequence[Any], Attributes], nn.Module]] = {
    "Conv": _convolution,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "BatchNormalization": _batch_norm,
}

# --- functions ---------------------------------------------------------------------------------


def _ints(value: Any) -> list[int]:
    return [int(v) for v in value.reshape(-1).tolist()]


def _reshape(given: Sequence[Any], more: Attributes) -> Tensor:
    x, shape = given[0], _ints(given[1])
    sizes = [x.shape[i] if s == 0 and not more.get("allowzero") else s for i, s in enumerate(shape)]
    if sizes and sizes[0] == 1 and -1 not in sizes:
        sizes[0] = -1  # exported for one example: any batch
    return torch.reshape(x, sizes)


def _pool(function: Callable[..., Any]) -> Callable[[Sequence[Any], Attributes], Any]:
    def pool(given: Sequence[Any], more: Attributes) -> Any:
        kernel = list(more["kernel_shape"])
        pads = list(more.get("pads", [0] * 2 * len(kernel)))
        if pads[: len(kernel)] != pads[len(kernel) :] or more.get("ceil_mode", 0):
            raise DataError("an ONNX pooling with uneven pads or ceil_mode can't be read")
        strides = list(more.get("strides", [1] * len(kernel)))
        settings: dict[str, Any] = {}
        if function is functional.avg_pool2d:
            settings["count_include_pad"] = bool(more.get("count_include_pad", 0))
        return function(given[0], kernel, strides, pads[: len(kernel)], **settings)

    return pool


def _reduce_mean(given: Sequence[Any], more: Attributes) -> Tensor:
    axes = _ints(given[1]) if len(given) > 1 else list(more["axes"])
    out: Tensor = given[0].mean(axes, keepdim=bool(more.get("keepdims", 1)))
    return out


def _clip(given: Sequence[Any], more: Attributes) -> Tensor:
    low, high = (
        given[i] if len(given) > i and given[i] is not None else more.get(name)
        for i, name in ((1, "min"), (2, "max"))
    )
    return torch.clamp(given[0], low, high)


_CALLS: dict[str, Callable[[Sequence[Any], Attributes], Any]] = {
    "Relu": lambda g, m: torch.relu(g[0]),
    "LeakyRelu": lambda g, m: functional.leaky_relu(g[0], m.get("alpha", 0.01)),
    "Sigmoid": lambda g, m: torch.sigmoid(g[0]),
    "Tanh": lambda g, m: torch.tanh(g[0]),
    "HardSwish": lambda g, m: functional.hardswish(g[0]),
    "HardSigmoid": lambda g, m: torch.clamp(g[0] * m.get("alpha", 0.2) + m.get("beta", 0.5), 0, 1),
    "Softmax": lambda g, m: torch.softmax(g[0], m.get("axis", -1)),
    "Clip": _clip,
    "Add": lambda g, m: g[0] + g[1],
    "Sub": lambda g, m: g[0] - g[1],
    "Mul": lambda g, m: g[0] * g[1],
    "Div": lambda g, m: g[0] / g[1],
    "Concat": lambda g, m: torch.cat(list(g), m["axis"]),
    "Flatten": lambda g, m: torch.flatten(g[0], m.get("axis", 1)),
    "Reshape": _reshape,
    "Squeeze": lambda g, m: torch.squeeze(g[0], _ints(g[1])),
    "Transpose": lambda g, m: g[0].permute(*m["perm"]),
    "Identity": lambda g, m: g[0],
    "Dropout": lambda g, m: g[0],
    "ReduceMean": _reduce_mean,
    "GlobalAveragePool": lambda g, m: g[0].mean((2, 3), keepdim=True),
    "AveragePool": _pool(functional.avg_pool2d),
    "MaxPool": _pool(functional.max_pool2d),
}
