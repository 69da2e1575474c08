"""Marks in an ONNX graph become QuantizeLinear and DequantizeLinear, and weights integers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from espalier.errors import ExportError
from espalier.export.nbits import matmul_nbits
from espalier.export.quantised import DOMAIN, MARK, Rounding, Weights

Array = NDArray[Any]
_MICROSOFT = "com.microsoft"
_VIEWS = ("Flatten", "Reshape", "Squeeze")
_PRODUCTS = ("Conv", "Gemm", "MatMul")


def with_integers(data: bytes, roundings: Mapping[str, Rounding]) -> bytes:
    """A marked ONNX model with integers where the marks are. Errors: `ExportError`."""
    model = onnx.load_from_string(data)
    graph = _Graph(model)
    for mark, name in graph.round_tensors(roundings):
        weights, levels = roundings[name].weights, roundings[name].levels
        if weights is not None and weights.block:
            graph.pack(graph.product(mark, name), weights)
        elif weights is not None and levels is not None:
            graph.weigh(graph.product(mark, name), name, weights, levels[0])
    graph.finish()
    return bytes(model.SerializeToString())


class _Graph:
    """A graph being changed: initialisers and readers by name, nodes in order."""

    def __init__(self, model: Any) -> None:
        self.model, self.graph = model, model.graph
        self.nodes = [_copy(node) for node in self.graph.node]
        self.constants = {t.name: t for t in self.graph.initializer}
        self.readers: dict[str, list[Any]] = defaultdict(list)
        for node in self.nodes:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.constants[node.output[0]] = node.attribute[0].t
            self._turn(node)
            for name in node.input:
                self.readers[name].append(node)

    def _turn(self, node: Any) -> None:
        """A copied or transposed constant is a constant, which not every exporter sees."""
        if node.op_type not in ("Identity", "Transpose") or node.input[0] not in self.constants:
            return
        value = numpy_helper.to_array(self.constants[node.input[0]])
        if node.op_type == "Transpose":
            value = value.transpose(
                next((a.ints for a in node.attribute if a.name == "perm"), None)
            )
        self.constants[node.output[0]] = numpy_helper.from_array(value.copy(), node.output[0])

    def round_tensors(self, roundings: Mapping[str, Rounding]) -> list[tuple[Any, str]]:
        """Every mark replaced; gives the marks, each with its name.

        A mark behind one of the same levels rounds nothing more, and marks of one tensor with the
        same levels are one: otherwise a runtime would convert there and back.
        """
        source: dict[str, str] = {}  # a mark's output -> the tensor that takes its place
        level_of: dict[str, tuple[float, int]] = {}  # a dequantised tensor -> its levels
        made: dict[tuple[str, float, int], str] = {}
        found: list[tuple[Any, str]] = []
        nodes: list[Any] = []
        for node in self.nodes:
            for i, name in enumerate(node.input):
                node.input[i] = source.get(name, name)
            if node.domain != DOMAIN or node.op_type != MARK:
                nodes.append(node)
                continue
            name = next(a.s.decode() for a in node.attribute if a.name == "name")
            taken, levels = node.input[0], roundings[name].levels
            out = taken
            if levels is not None and level_of.get(taken) != levels:
                key = (taken, *levels)
                if key not in made:
                    self._reach_back(nodes, taken, levels)
                    pair = self._pair(taken, levels)
                    nodes += pair
                    made[key] = pair[-1].output[0]
                    level_of[made[key]] = levels
                out = made[key]
            source[node.output[0]] = out
            found.append((node, name))
        for value in self.graph.output:
            if value.name in source:
                nodes.append(helper.make_node("Identity", [source[value.name]], [value.name]))
        self.nodes = nodes
        return found

    def _reach_back(self, nodes: list[Any], taken: str, levels: tuple[float, int]) -> None:
        """What only changes the shape is fed with rounded numbers too, so that it stays whole."""
        view = next((n for n in reversed(nodes) if taken in n.output), None)
        if view is not None and view.op_type in _VIEWS and len(self.readers[taken]) == 1:
            pair = self._pair(view.input[0], levels)
            place = next(i for i, node in enumerate(nodes) if node is view)
            nodes[place:place] = pair
            view.input[0] = pair[-1].output[0]

    def _pair(self, name: str, levels: tuple[float, int]) -> list[Any]:
        scale = self.constant(f"{name}_scale", np.array(levels[0], np.float32))
        zero = self.constant(f"{name}_zero_point", np.array(levels[1], np.uint8))
        whole, back = f"{name}_quantised", f"{name}_dequantised"
        if scale != f"{name}_scale":  # the tensor is rounded twice, in different ways
            whole, back = whole + scale, back + scale
        return [
            helper.make_node("QuantizeLinear", [name, scale, zero], [whole]),
            helper.make_node("DequantizeLinear", [whole, scale, zero], [back]),
        ]

    def constant(self, name: str, value: Array) -> str:
        """A new initialiser; its name gets a number where it is taken."""
        free, number = name, 1
        while free in self.constants:
            free, number = f"{name}_{number}", number + 1
        self.constants[free] = numpy_helper.from_array(value, free)
        self.graph.initializer.append(self.constants[free])
        return free

    def product(self, mark: Any, name: str) -> Any:
        """The convolution or product that reads a layer's mark."""
        found = [n for n in self.readers[mark.output[0]] if n.op_type in _PRODUCTS]
        if len(found) != 1 or found[0].input[1] not in self.constants:
            raise ExportError(
                f"the layer {name!r} is no single convolution or product in ONNX, so its integers "
                "have no place: leave it out of the bits (layers=...)"
            )
        return found[0]

    def weigh(self, node: Any, name: str, weights: Weights, input_scale: float) -> None:
        """Weight and bias of a node as integers, dequantised in the graph."""
        axis = 0 if node.op_type == "Conv" or _turned(node) else 1
        folded = numpy_helper.to_array(self.constants[node.input[1]])
        scales = weights.scales * _folding(np.moveaxis(folded, axis, 0), weights.values)
        bias = None
        if len(node.input) > 2 and node.input[2] in self.constants:
            bias = numpy_helper.to_array(self.constants[node.input[2]]).reshape(-1)
            # a channel of next to no weight must leave room for its bias in 32 bits
            scales = np.maximum(scales, np.abs(bias) / (input_scale * 2.0**30))
        scales = np.maximum(scales, np.float32(1e-30)).astype(np.float32)
        most = 2 ** (weights.bits - 1) - 1
        shape = [-1 if i == axis else 1 for i in range(folded.ndim)]
        whole = np.clip(np.round(folded / scales.reshape(shape)), -most, most).astype(np.int8)
        node.input[1] = self._dequantised(node, f"{name}.weight", whole, scales, axis)
        if bias is not None:
            per = (scales.astype(np.float64) * input_scale).astype(np.float32)
            summed = np.round(bias / per.astype(np.float64)).astype(np.int32)
            node.input[2] = self._dequantised(node, f"{name}.bias", summed, per, 0)

    def _dequantised(self, node: Any, name: str, whole: Array, scales: Array, axis: int) -> str:
        parts = [
            self.constant(f"{name}_quantised", whole),
            self.constant(f"{name}_scale", scales),
            self.constant(f"{name}_zero_point", np.zeros(len(scales), whole.dtype)),
        ]
        out = parts[0].replace("_quantised", "_dequantised")
        made = helper.make_node("DequantizeLinear", parts, [out], axis=axis)
        self.nodes.insert(self._place(node), made)
        return out

    def pack(self, node: Any, weights: Weights) -> None:
        """A product with weights of few bits, which ONNX Runtime unpacks as it multiplies."""
        place = self._place(node)
        made, constants = matmul_nbits(node, weights)
        for name, value in constants.items():
            free = self.constant(name, value)
            for one in made:
                for i, taken in enumerate(one.input):
                    one.input[i] = free if taken == name else taken
        del self.nodes[place]
        for one in reversed(made):
            self.nodes.insert(place, one)
        if not any(o.domain == _MICROSOFT for o in self.model.opset_import):
            self.model.opset_import.append(helper.make_opsetid(_MICROSOFT, 1))

    def _place(self, node: Any) -> int:
        return next(i for i, other in enumerate(self.nodes) if other is node)

    def finish(self) -> None:
        """Drops what nothing reads any more, and the marks' own operator set."""
        used = {value.name for value in self.graph.output}
        kept: list[Any] = []
        for node in reversed(self.nodes):
            if set(node.output) & used:
                kept.append(node)
                used.update(node.input)
        del self.graph.node[:]
        self.graph.node.extend(reversed(kept))
        for tensor in [t for t in self.graph.initializer if t.name not in used]:
            self.graph.initializer.remove(tensor)
        sets = [_copy(o) for o in self.model.opset_import if o.domain != DOMAIN]
        del self.model.opset_import[:]
        self.model.opset_import.extend(sets)


def _copy(message: Any) -> Any:
    made = type(message)()
    made.CopyFrom(message)
    return made


def _turned(node: Any) -> bool:
    return any(a.name == "transB" and a.i for a in node.attribute)


def _folding(folded: Array, plain: Array) -> NDArray[np.float64]:
    """By what each output channel was multiplied when a batch-norm was folded into the weight."""
    rows, own = folded.reshape(len(folded), -1), plain.reshape(len(plain), -1)
    norm = np.square(own, dtype=np.float64).sum(axis=1)
    dot = (rows.astype(np.float64) * own).sum(axis=1)
    ratio: NDArray[np.float64] = np.divide(dot, norm, out=np.ones_like(dot), where=norm > 0)
    return np.abs(ratio)
