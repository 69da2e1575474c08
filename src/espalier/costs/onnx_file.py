"""Any ONNX file priced like a candidate: counted from its graph, measured on a runtime."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from espalier.costs.count import peak
from espalier.costs.record import Operation, Record, Shape
from espalier.costs.runtime import OnnxRuntime
from espalier.errors import DataError
from espalier.problem import Reading


def price_onnx(
    path: str | Path, runtime: OnnxRuntime | None = None, note: Callable[[str], None] | None = None
) -> dict[str, Reading]:
    """Prices an ONNX file: params, macs, activation_bytes, bytes, latency_ms.

    - `params`: elements of its initialisers; those of 64-bit whole numbers (shapes) and scales and
      zero points of quantised tensors left out. Exporters fold batch-norms away, so it can differ
      from the torch network's.
    - `macs`, `activation_bytes`: of one run at the runtime's batch, from the graph's inferred
      shapes; left out where shapes can't be inferred. For activation_bytes see `costs.count`;
      quantised tensors count as the float ones that they stand for.
    - `bytes`: the file and its external data on disk.
    - `latency_ms`: measured; the spread is the half-width of the median's 95% interval.

    A dynamic first dimension of the inputs is set to the runtime's batch. `note` is told why a
    timing can't be trusted. Errors: `DataError` for what is no ONNX model or does not run.
    """
    path = Path(path)
    runtime = runtime or OnnxRuntime()
    model = _read(path)
    _set_batch(model, runtime.batch, path)
    timing = runtime.measure(path)
    if timing.busy and note is not None:
        note(timing.reason)
    found = {"params": Reading(float(_params(model)))}
    try:
        run = _record(model)
    except _Unshaped as missing:
        if note is not None:
            note(f"macs and activation_bytes are unknown: no shape can be inferred for {missing}")
    else:
        found["macs"] = Reading(float(sum(operation.macs for operation in run.operations)))
        found["activation_bytes"] = Reading(float(peak(run)), "B")
    found["bytes"] = Reading(float(_size(path, model)), "B")
    spread = timing.spread * timing.median_ms
    found["latency_ms"] = Reading(timing.median_ms, "ms", "measured", spread=spread)
    return found


class _Unshaped(Exception):
    """A tensor whose shape stays unknown."""


def _read(path: Path) -> Any:
    if not path.is_file():
        raise DataError(f"no file {path}: give the path of an ONNX model")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise DataError(f"{path} is not a readable ONNX file: {_first(error)}") from error
    # protobuf reads some foreign files as an empty model
    if not model.graph.node or not model.opset_import:
        raise DataError(f"{path} holds no ONNX graph: give a file written by an ONNX exporter")
    return model


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _inputs(model: Any) -> list[Any]:
    """The graph's inputs without the weights that old files list among them."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in weights]


def _set_batch(model: Any, batch: int, path: Path) -> None:
    for i, value in enumerate(_inputs(model)):
        dims = value.type.tensor_type.shape.dim
        if not dims:
            continue
        if dims[0].HasField("dim_value") and dims[0].dim_value > 0:
            if i == 0 and dims[0].dim_value != batch:
                raise DataError(
                    f"{path} has a fixed batch of {dims[0].dim_value}, the runtime asks for "
                    f"{batch}: measure with batch={dims[0].dim_value}, or export a dynamic batch"
                )
        else:
            dims[0].dim_value = batch
    # declared shapes of outputs and values may still say "batch": let inference find them
    del model.graph.value_info[:]
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")


def _params(model: Any) -> int:
    levels = {n for node in model.graph.node if node.op_type in _ROUND for n in node.input[1:]}
    packed = {n.input[1]: _of(n, "K") * _of(n, "N") for n in _nbits(model)}
    levels |= {name for node in _nbits(model) for name in node.input[2:]}
    return sum(
        packed.get(t.name, math.prod(t.dims))
        for t in model.graph.initializer
        if t.data_type != onnx.TensorProto.INT64 and t.name not in levels
    )


_ROUND = ("QuantizeLinear", "DequantizeLinear")


def _nbits(model: Any) -> list[Any]:
    """Products whose weights are packed into few bits."""
    return [node for node in model.graph.node if node.op_type == "MatMulNBits"]


def _of(node: Any, name: str) -> int:
    return next(int(a.i) for a in node.attribute if a.name == name)


def _size(path: Path, model: Any) -> int:
    """Bytes of the file and of the files beside it that hold its tensors."""
    beside = {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    # only plain names: a foreign file must not make us look elsewhere
    files = [path, *(path.parent / name for name in beside if Path(name).name == name)]
    return sum(file.stat().st_size for file in files if file.is_file())


# --- the graph as a record ---------------------------------------------------------------------

_VIEWS = {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout", *_ROUND}
_POINTWISE = {
    "Relu", "LeakyRelu", "PRelu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Elu",
    "Selu", "Gelu", "Erf", "Softplus", "Mish", "Swish", "Add", "Sub", "Mul", "Div", "Pow", "Sqrt",
    "Exp", "Neg", "Abs", "BatchNormalization",
}  # fmt: skip


def _record(model: Any) -> Record:
    """The main graph as a record of operations. Subgraphs (If, Loop) count as nothing."""
    shapes, widths = _values(model)
    weights = {tensor.name for tensor in model.graph.initializer}
    run, number = Record(), dict[str, int]()

    def storage(name: str) -> int:
        if name not in number:
            number[name] = len(number)
            run.sizes[number[name]] = math.prod(_known(shapes, name)) * widths.get(name, 4)
        return number[name]

    run.inputs = tuple(storage(value.name) for value in _inputs(model))
    for node in model.graph.node:
        if node.op_type == "Constant" or (node.op_type in _ROUND and node.input[0] in weights):
            weights.update(node.output)
            continue
        reads = tuple(storage(n) for n in node.input if n and n not in weights)
        if node.op_type in _VIEWS and reads and node.output:
            number[node.output[0]] = reads[0]
        out = _known(shapes, node.output[0])
        taken = tuple(shapes.get(name, ()) for name in node.input if name)
        run.operations.append(
            Operation(
                name=node.op_type,
                macs=_node_macs(node, taken, out),
                shapes=taken,
                out_shape=out,
                reads=reads,
                writes=tuple(storage(n) for n in node.output if n and n in shapes),
                pointwise=node.op_type in _POINTWISE,
            )
        )
    run.outputs = tuple(storage(value.name) for value in model.graph.output)
    return run


def _known(shapes: dict[str, Shape], name: str) -> Shape:
    if name not in shapes:
        raise _Unshaped(repr(name))
    return shapes[name]


def _values(model: Any) -> tuple[dict[str, Shape], dict[str, int]]:
    """Shape and bytes an element of every tensor whose shape is known."""
    try:
        graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except Exception as error:
        raise _Unshaped(_first(error)) from error
    shapes: dict[str, Shape] = {}
    widths: dict[str, int] = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        dims = tensor.shape.dim
        if tensor.HasField("shape") and all(d.HasField("dim_value") for d in dims):
            shapes[value.name] = tuple(int(d.dim_value) for d in dims)
            widths[value.name] = _width(tensor.elem_type)
    for weight in graph.initializer:
        shapes[weight.name] = tuple(map(int, weight.dims))
        widths[weight.name] = _width(weight.data_type)
    return shapes, widths


def _width(kind: int) -> int:
    try:
        return int(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind)).itemsize)
    except (KeyError, TypeError):
        return 4


_LEFT = {"MatMul": 0, "MatMulInteger": 0, "QLinearMatMul": 0, "FusedMatMul": 0}
_KERNEL = {"Conv": 1, "ConvInteger": 1, "FusedConv": 1, "QLinearConv": 3}


def _node_macs(node: Any, taken: tuple[Shape, ...], out: Shape) -> int:
    """Multiply-accumulates of one node; 0 for what is no convolution and no product."""
    kind = node.op_type
    if kind in _KERNEL and len(taken) > _KERNEL[kind]:
        return math.prod(out) * math.prod(taken[_KERNEL[kind]][1:])
    if kind == "ConvTranspose":
        return math.prod(taken[0]) * math.prod(taken[1][1:])
    if kind in _LEFT and taken[0]:
        return math.prod(out) * taken[0][-1]
    if kind == "Gemm":
        turned = any(a.name == "transA" and a.i for a in node.attribute)
        return math.prod(out) * taken[0][0 if turned else 1]
    return 0
