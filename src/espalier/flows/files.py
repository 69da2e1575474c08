"""A model from a file that holds its graph: torch.export's .pt2, its layers made layers again."""

from __future__ import annotations

import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from espalier.errors import DataError
from espalier.export.quiet import quiet

SUFFIXES = (".pt2", ".onnx")


def from_file(path: Path) -> nn.Module:
    """The model of a .pt2 or .onnx file, plain, with the layers and the weights of the file.

    Nothing in the file is run when it is read. Errors: `DataError` in one line.
    """
    return read_file(path)[0]


def read_file(path: Path) -> tuple[nn.Module, int | None]:
    """The model of a file, and the batch that it was exported for where it is fixed."""
    if path.suffix not in SUFFIXES:
        raise DataError(
            f"can't read a model from {str(path)!r}: give model.py:make_model, or a file that "
            "ends in .pt2 (torch.export) or .onnx"
        )
    if not path.is_file():
        raise DataError(f"no model file {str(path)!r}")
    if path.suffix == ".onnx":
        from espalier.flows.onnx_model import read_onnx

        return read_onnx(path)
    try:
        with quiet():
            program = torch.export.load(path)
        return from_program(program), _fixed_batch(program)
    except DataError:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"can't read {path} as a file of torch.export: {first[:160]}") from error


def _fixed_batch(program: torch.export.ExportedProgram) -> int | None:
    given = set(program.graph_signature.user_inputs)
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in given:
            shape: Any = getattr(node.meta.get("val"), "shape", ())
            return shape[0] if len(shape) and isinstance(shape[0], int) else None
    return None


def from_program(program: torch.export.ExportedProgram) -> nn.Module:
    """The graph of an exported program as a module: convolutions, linear layers and norms are
    torch's own layers under their old names, all else is called as a function."""
    return _Rebuilt(program).module()


class _Rebuilt:
    """One exported graph, copied node by node."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        signature = program.graph_signature
        self.program = program
        self.names: dict[str, str] = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        held = {**program.state_dict, **program.constants}
        self.tensors: dict[str, Tensor] = {n: held[path] for n, path in self.names.items()}
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.values: dict[fx.Node, Any] = {}

    def module(self) -> nn.Module:
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                if node.name not in self.tensors:
                    self.values[node] = self.graph.placeholder(node.name)
            elif node.op == "call_function":
                self.values[node] = self.call(node)
            elif node.op == "output":
                self.graph.output(self.result(node))
        made = fx.GraphModule(self.root, self.graph)
        made.graph.eliminate_dead_code()
        made.recompile()
        made.delete_all_unused_submodules()
        return made.eval()

    def result(self, node: fx.Node) -> Any:
        """The first thing that the program gives to its user; changed buffers are left out."""
        wanted = self.program.graph_signature.user_outputs
        outputs = [a for a in node.args[0] if isinstance(a, fx.Node) and a.name in wanted]  # type: ignore[union-attr]
        if len(outputs) != 1:
            raise DataError(f"a model gives one tensor, this program gives {len(outputs)}")
        return self.value(outputs[0])

    def value(self, item: Any) -> Any:
        return fx.node.map_arg(item, self.one)

    def one(self, node: fx.Node) -> Any:
        if node in self.values:
            return self.values[node]
        path = self.names[node.name].replace(".", "_")  # a tensor that no layer holds
        if not hasattr(self.root, path):
            tensor = self.tensors[node.name]
            if isinstance(tensor, nn.Parameter):
                self.root.register_parameter(path, nn.Parameter(tensor.detach().clone()))
            else:
                self.root.register_buffer(path, tensor.detach().clone())
        self.values[node] = self.graph.get_attr(path)
        return self.values[node]

    def call(self, node: fx.Node) -> Any:
        schema: Any = getattr(node.target, "_schema", None)
        make = _LAYERS.get("" if schema is None else schema.name)
        if make is not None:
            given: dict[str, Any] = dict(node.kwargs)
            given |= zip((a.name for a in schema.arguments), node.args, strict=False)
            given["rank"] = getattr(given["input"].meta.get("val"), "ndim", 0)
            layer = make(given, self.tensor)
            if layer is not None:
                weight = given.get("weight")
                place = "" if weight is None else self.names[weight.name].rpartition(".")[0]
                place = place or node.name
                return self.graph.call_module(self.put(place, layer), (self.value(given["input"]),))
        target: Any = node.target
        if target is operator.getitem or callable(target):
            return self.graph.call_function(target, self.value(node.args), self.value(node.kwargs))
        raise DataError(f"the program calls {target}, which can't be read")

    def tensor(self, item: Any) -> Tensor | None:
        """The weight behind an argument; None where it is computed."""
        if isinstance(item, fx.Node) and item.name in self.tensors:
            return self.tensors[item.name].detach().clone()
        return None

    def put(self, path: str, layer: nn.Module) -> str:
        """A layer under its old name; a layer that is called twice is one layer."""
        parent, parts = self.root, path.split(".")
        for part in parts[:-1]:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        if not hasattr(parent, parts[-1]):
            parent.add_module(parts[-1], layer)
        return path


_Take = Callable[[Any], Tensor | None]


def _convolution(given: dict[str, Any], tensor: _Take) -> nn.Module | None:
    weight, bias = tensor(given["weight"]), tensor(given.get("bias"))
    padding = given.get("padding", 0)
    if weight is None or (given.get("bias") is not None and bias is None):
        return None
    kind: Any = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[weight.dim()]
    groups = int(given.get("groups", 1))
    layer = kind(
        weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]),
        _spread(given.get("stride", 1), weight), padding if isinstance(padding, str) else
        _spread(padding, weight), _spread(given.get("dilation", 1), weight), groups,
        bias is not None,
    )  # fmt: skip
    return _filled(layer, weight=weight, bias=bias)


def _spread(value: Any, weight: Tensor) -> Any:
    values = [value] if isinstance(value, int) else list(value)
    return tuple(values * (weight.dim() - 2) if len(values) == 1 else values)


def _linear(given: dict[str, Any], tensor: _Take) -> nn.Module | None:
    weight, bias = tensor(given["weight"]), tensor(given.get("bias"))
    if weight is None or (given.get("bias") is not None and bias is None):
        return None
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    return _filled(layer, weight=weight, bias=bias)


def _batch_norm(given: dict[str, Any], tensor: _Take) -> nn.Module | None:
    names = ("weight", "bias", "running_mean", "running_var")
    found = {name: tensor(given.get(name)) for name in names}
    if any(t is None for t in found.values()):
        return None
    kind: Any = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 5: nn.BatchNorm3d}.get(
        given["rank"], nn.BatchNorm2d
    )
    layer = kind(len(found["weight"]), eps=given.get("eps", 1e-5))  # type: ignore[arg-type]
    return _filled(layer, **found)


def _layer_norm(given: dict[str, Any], tensor: _Take) -> nn.Module | None:
    weight, bias = tensor(given.get("weight")), tensor(given.get("bias"))
    if weight is None or (given.get("bias") is not None and bias is None):
        return None
    shape = list(given["normalized_shape"])
    return _filled(
        nn.LayerNorm(shape, given.get("eps", 1e-5), bias=bias is not None), weight=weight, bias=bias
    )


def _dropout(given: dict[str, Any], tensor: _Take) -> nn.Module:
    """As a layer, it drops while the model trains, in whichever mode that was exported."""
    return nn.Dropout(float(given["p"])).eval()


def _channel_dropout(given: dict[str, Any], tensor: _Take) -> nn.Module:
    kind: Any = {4: nn.Dropout2d, 5: nn.Dropout3d}.get(given["rank"], nn.Dropout1d)
    layer: nn.Module = kind(float(given["p"]))
    return layer.eval()


def _filled(layer: nn.Module, **tensors: Tensor | None) -> nn.Module:
    with torch.no_grad():
        for name, tensor in tensors.items():
            if tensor is not None:
                getattr(layer, name).copy_(tensor)
    return layer.eval()


_LAYERS: dict[str, Callable[[dict[str, Any], _Take], nn.Module | None]] = {
    "aten::conv1d": _convolution,
    "aten::conv2d": _convolution,
    "aten::conv3d": _convolution,
    "aten::linear": _linear,
    "aten::batch_norm": _batch_norm,
    "aten::layer_norm": _layer_norm,
    "aten::dropout": _dropout,
    "aten::feature_dropout": _channel_dropout,
}
