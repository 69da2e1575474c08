"""An ONNX file as a torch module: the operators of convolutional networks, perceptrons, attention."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import external_data_helper, numpy_helper
from torch import Tensor, fx, nn

from espalier.errors import DataError
from espalier.flows.onnx_operators import CALLS, LAYERS, OPERATORS
from espalier.flows.onnx_sizes import COMPUTED, Attributes, Sizes, small


def from_onnx(path: Path) -> nn.Module:
    """The graph of an ONNX file with torch's layers for what has weights, in evaluation mode.

    One input and one output, floats; weights may be in files beside it. Errors: `DataError` for a
    file that is none, or an operator that has no counterpart here (it is named).
    """
    return read_onnx(path)[0]


def read_onnx(path: Path) -> tuple[nn.Module, int | None]:
    """The module, and the batch that the file was exported for where it is fixed."""
    try:
        bare = onnx.load(str(path), load_external_data=False)
        _check_files(bare, path)
        onnx.checker.check_model(str(path))
        model = onnx.load(str(path))  # with the data of the files in its own folder
        rebuilt = _Rebuilt(model)
        return rebuilt.module(), rebuilt.batch
    except DataError:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"can't read {path} as an ONNX file of a network: {first[:160]}") from error


def _check_files(model: Any, path: Path) -> None:
    """Errors: `DataError` where a file with weights is not in the folder of the ONNX file."""
    for tensor in model.graph.initializer:
        if external_data_helper.uses_external_data(tensor):
            name = external_data_helper.ExternalDataInfo(tensor).location
            if not (path.parent / name).is_file():
                raise DataError(
                    f"{path} keeps its weights in {name!r}, which is not in the same folder: "
                    "put both files there"
                )


class _Rebuilt:
    """One graph, node by node. A value is a node of the new graph, or a constant tensor."""

    def __init__(self, model: Any) -> None:
        self.source = model.graph
        self.root, self.graph = nn.Module(), fx.Graph()
        self.tracer = fx.proxy.GraphAppendingTracer(self.graph)  # of all proxies: they may meet
        self.values: dict[str, Any] = {"": None}
        for tensor in self.source.initializer:
            self.values[tensor.name] = _tensor(tensor)
        self.weights = {t.name for t in self.source.initializer}
        self.inputs = [i.name for i in self.source.input if i.name not in self.weights]
        self.outputs = [o.name for o in self.source.output]
        self.uses = Counter(n for node in self.source.node for n in node.input)
        self.uses.update(self.outputs)
        self.held: dict[int, str] = {}  # the buffer of each constant
        # layers whose bias may come with an addition, by the value that they give
        self.bare: dict[str, tuple[fx.Node, nn.Linear]] = {}
        self.biases = _biases(self.source, self.weights)
        self.batch = _fixed_batch(self.source, self.inputs)
        self.shapes = _shapes(model, self.inputs)

    def module(self) -> nn.Module:
        if len(self.inputs) != 1 or len(self.outputs) != 1:
            raise DataError(
                f"a model has one input and one output, this file has {len(self.inputs)} and "
                f"{len(self.outputs)}"
            )
        self.values[self.inputs[0]] = self.graph.placeholder("input")
        for i, node in enumerate(self.source.node):
            made = self.made(node, node.name or f"{node.op_type}_{i}")
            found = made if isinstance(made, list) else [made]
            self.values |= dict(zip(node.output, found, strict=False))
        self.graph.output(self.node(self.values[self.outputs[0]]))
        made = fx.GraphModule(self.root, self.graph)
        made.graph.eliminate_dead_code()  # sizes that were read and then folded away
        made.recompile()
        return made.eval()

    def made(self, node: Any, name: str) -> Any:
        given = [self.values[n] for n in node.input]
        more = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        kind = node.op_type
        if kind == "Constant":
            return _constant(more)
        if kind == "Shape":
            return self.shape(node.input[0], more)
        if kind in COMPUTED and (numbers := small(given)) is not None:
            return COMPUTED[kind](numbers, more)
        if (
            kind in LAYERS
            and isinstance(given[1], Tensor)
            and (kind != "MatMul" or (given[1].dim() == 2 and isinstance(given[0], fx.Node)))
        ):
            layer = self.layer(node, given, more)
            made = self.graph.call_module(
                self.put(self.path(node, name), layer), (self.node(given[0]),)
            )
            if isinstance(layer, nn.Linear) and layer.bias is None:
                self.bare[node.output[0]] = made, layer
            return made
        if kind == "Add" and (whole := self.with_bias(node, given)) is not None:
            return whole
        if kind not in CALLS:
            if kind in LAYERS:
                raise DataError(f"an ONNX {kind} whose weights are computed can't be read")
            raise DataError(
                f"the ONNX operator {kind!r} can't be read; those that can: {', '.join(OPERATORS)}"
            )
        if kind == "Reshape":
            more["batch"] = self.batch
        if kind in ("Expand", "GlobalAveragePool"):
            more["rank"] = self.rank(node.input[0])
        if all(v is None or isinstance(v, Tensor) for v in given):
            return CALLS[kind](given, more)  # constants are computed now
        # calls on proxies write themselves into the graph, as torch's own functions
        found = CALLS[kind]([self.proxy(v) for v in given], more)
        return [f.node for f in found] if isinstance(found, list) else found.node

    def layer(self, node: Any, given: Sequence[Any], more: Attributes) -> nn.Module:
        if node.op_type == "BatchNormalization":
            more["rank"] = self.rank(node.input[0])
        return LAYERS[node.op_type](given, more)

    def with_bias(self, node: Any, given: Sequence[Any]) -> Any:
        """A linear layer and the vector that only it is added to are one layer; else None."""
        for name, bias in zip(node.input, reversed(given), strict=True):
            if name not in self.bare or not isinstance(bias, Tensor) or self.uses[name] != 1:
                continue
            made, linear = self.bare[name]
            if tuple(bias.shape) == (linear.out_features,):
                linear.bias = nn.Parameter(bias.clone())
                return made
        return None

    def path(self, node: Any, name: str) -> str:
        """The layer's old name, where the weight tells it, or the bias that is added after it."""
        weight, bias = node.input[1], self.biases.get(node.output[0])
        if bias is not None and not weight.endswith(".weight"):
            weight = f"{bias.removesuffix('.bias')}.weight"
        return _path(weight, name)

    def shape(self, name: str, more: Attributes) -> Sizes:
        """The sizes of a value: numbers where the file fixes them, the batch is read as it runs."""
        value = self.values[name]
        known: Sequence[int | None] | None = self.shapes.get(name)
        if isinstance(value, Tensor):
            known = value.shape
        if known is None:
            raise DataError("an ONNX Shape of a value whose dimensions are not known can't be read")
        sizes = [self.proxy(value).size(i) if n is None else n for i, n in enumerate(known)]
        return Sizes(sizes[more.get("start", 0) : more.get("end", len(sizes))])

    def rank(self, name: str) -> int | None:
        value = self.values[name]
        known = value.shape if isinstance(value, Tensor) else self.shapes.get(name)
        return None if known is None else len(known)

    def proxy(self, value: Any) -> Any:
        """What a call can take: whole numbers are shapes and axes, and stay as they are."""
        if value is None or isinstance(value, Sizes):
            return value
        if isinstance(value, Tensor) and not value.is_floating_point():
            return value
        if isinstance(value, Tensor) and value.dim() == 0:
            return float(value)
        return fx.Proxy(self.node(value), self.tracer)

    def node(self, value: Any) -> Any:
        """A constant becomes a buffer of the module."""
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self.held:
            self.held[id(value)] = f"constant_{len(self.held)}"
            self.root.register_buffer(self.held[id(value)], value)
        return self.graph.get_attr(self.held[id(value)])

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


def _constant(more: Attributes) -> Any:
    """What a node Constant holds, in any of the forms that a file may write it."""
    if "value" in more:
        return _tensor(more["value"])
    found = next(iter(more.values()))
    if isinstance(found, (int, float)) or all(isinstance(v, (int, float)) for v in found):
        return torch.tensor(found)
    raise DataError("an ONNX Constant that holds no numbers can't be read")


def _fixed_batch(graph: Any, inputs: Sequence[str]) -> int | None:
    for given in graph.input:
        dims = given.type.tensor_type.shape.dim
        if given.name in inputs and dims:
            return int(dims[0].dim_value) or None
    return None


def _biases(graph: Any, weights: set[str]) -> dict[str, str]:
    """The names of biases, by the value that each is added to."""
    return {
        value: bias
        for node in graph.node
        if node.op_type == "Add"
        for value, bias in (node.input, reversed(node.input))
        if bias in weights and bias.endswith(".bias")
    }


def _shapes(model: Any, inputs: Sequence[str]) -> dict[str, list[int | None]]:
    """The dimensions of values by name: None where they are free, as the batch always is."""
    twin = type(model)()
    twin.CopyFrom(model)
    del twin.graph.value_info[:]  # they may hold the batch that the file was exported for
    for value in (*twin.graph.input, *twin.graph.output):
        dims = value.type.tensor_type.shape.dim
        if dims and (value.name in inputs or value in twin.graph.output):
            dims[0].dim_param = "batch"
    try:
        graph = onnx.shape_inference.infer_shapes(twin).graph
    except Exception:  # what is too large for it, or breaks its rules: nothing is known
        return {}
    return {
        v.name: [int(d.dim_value) or None for d in v.type.tensor_type.shape.dim]
        for v in (*graph.input, *graph.value_info, *graph.output)
        if v.type.tensor_type.HasField("shape")
    }


def _path(weight: str, name: str) -> str:
    """The layer's old name, where the weight tells it."""
    base = weight.removesuffix(".weight") if weight.endswith(".weight") else name
    return ".".join(p for p in base.replace("/", ".").replace(":", "_").split(".") if p) or "layer"
