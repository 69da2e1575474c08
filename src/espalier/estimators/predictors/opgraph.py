"""Operator graphs of any network, from ONNX or torch.export, in an order that files do not decide.

GENNAPE (Mills et al., 2023, https://arxiv.org/abs/2211.17226) describes networks of any space as
graphs of atomic operators; ONNX-Net does it in lines of text. Both are read here from one graph.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.errors import DataError

Sizes = tuple[int, ...]
NUMBERS = ("weights", "outputs", "channels", "pixels", "kernel", "stride", "groups", "depth")


@dataclass(frozen=True)
class Operator:
    """One operator: its type, settings, shapes of weights, inputs and output (without the batch).

    `inputs` are positions of the operators that feed it, -1 being the network's input.
    """

    kind: str
    settings: tuple[tuple[str, str], ...] = ()
    weights: tuple[Sizes, ...] = ()
    inputs: tuple[int, ...] = ()
    shapes: tuple[Sizes, ...] = ()
    output: Sizes = ()

    def line(self) -> str:
        """The operator as text: kind(settings, weights, inputs)->output."""
        parts = [f"{k}={v}" for k, v in self.settings]
        parts += ["w" + _text(w) for w in self.weights] + [_text(s) for s in self.shapes]
        return f"{self.kind}({', '.join(parts)})->{_text(self.output)}"

    def setting(self, name: str, default: float = 1.0) -> float:
        """The first number of a setting."""
        text = dict(self.settings).get(name, "")
        head = text.split("x")[0]
        return float(head) if head.lstrip("-").replace(".", "", 1).isdigit() else default


@dataclass(frozen=True)
class OpGraph:
    """A network's operators in canonical order: topological, and the same however a file lists or
    names them. Operators that are exactly alike, in all that feeds them and that they feed, keep
    no order of their own, and need none."""

    operators: tuple[Operator, ...]

    @property
    def adjacency(self) -> NDArray[np.bool_]:
        """`(v, v)`: `[a, b]` means that a feeds b."""
        out = np.zeros((len(self.operators),) * 2, dtype=bool)
        for b, operator in enumerate(self.operators):
            for a in operator.inputs:
                if a >= 0:
                    out[a, b] = True
        return out

    @property
    def numbers(self) -> NDArray[np.float64]:
        """`(v, len(NUMBERS))`: logarithms of sizes and settings, and the place in the order, 0..1."""
        rows = []
        for i, o in enumerate(self.operators):
            weights = sum(math.prod(w) for w in o.weights)
            spatial = o.output[1:] if len(o.output) == 3 else ()
            rows.append(
                [
                    math.log1p(weights),
                    math.log1p(math.prod(o.output)),
                    math.log1p(o.output[0]) if o.output else 0.0,
                    math.log1p(math.prod(spatial)) if spatial else 0.0,
                    math.log(o.setting("kernel_shape")),
                    math.log(o.setting("strides")),
                    math.log(o.setting("group")),
                    i / max(len(self.operators) - 1, 1),
                ]
            )
        return np.array(rows, dtype=np.float64).reshape(len(rows), len(NUMBERS))

    @property
    def macs(self) -> float:
        """Multiply-accumulates of the convolutions and matrix products, for one example."""
        total = 0.0
        for o in self.operators:
            for weight in o.weights:
                if o.kind == "Conv" and len(weight) > 2:
                    total += math.prod(weight) * math.prod(o.output[1:])
                elif o.kind in ("Gemm", "MatMul") and len(weight) == 2:
                    rows = math.prod(o.output[:-1]) if o.output else 1
                    total += math.prod(weight) * rows
        return total

    @property
    def params(self) -> int:
        """Elements of all weights."""
        return sum(math.prod(w) for o in self.operators for w in o.weights)

    def to_json(self) -> list[Any]:
        """Plain JSON, which `from_json` reads."""
        return [[getattr(o, f.name) for f in fields(o)] for o in self.operators]

    @classmethod
    def from_json(cls, data: Sequence[Any]) -> OpGraph:
        """The graph that `to_json` wrote."""
        return cls(tuple(Operator(*(_frozen(part) for part in row)) for row in data))

    def lines(self) -> tuple[str, ...]:
        """The network as text, a line an operator, after ONNX-Net."""
        return tuple(o.line() for o in self.operators)


@dataclass(frozen=True)
class OpGraphs:
    """n operator graphs, padded: `operators (n, v)` of `vocabulary` (0 is padding ""), `numbers
    (n, v, k)`, `adjacency (n, v, v)`, `macs (n,)`."""

    operators: NDArray[np.int64]
    numbers: NDArray[np.float64]
    adjacency: NDArray[np.bool_]
    macs: NDArray[np.float64]
    vocabulary: tuple[str, ...] = field(default=("",))

    def __len__(self) -> int:
        return len(self.operators)

    def take(self, rows: Any) -> OpGraphs:
        """Some of the graphs."""
        return OpGraphs(
            self.operators[rows],
            self.numbers[rows],
            self.adjacency[rows],
            self.macs[rows],
            self.vocabulary,
        )


def stack(graphs: Sequence[OpGraph], vocabulary: Sequence[str] | None = None) -> OpGraphs:
    """Graphs side by side. Without a vocabulary that of the graphs; kinds outside it are the last."""
    if not graphs:
        raise DataError("there is no graph to stack: give at least one")
    kinds = {o.kind for g in graphs for o in g.operators}
    names = tuple(vocabulary) if vocabulary is not None else ("", *sorted(kinds), "?")
    index = {name: i for i, name in enumerate(names)}
    n, v = len(graphs), max(max(len(g.operators) for g in graphs), 1)
    operators = np.zeros((n, v), dtype=np.int64)
    numbers = np.zeros((n, v, len(NUMBERS)))
    adjacency = np.zeros((n, v, v), dtype=bool)
    for i, g in enumerate(graphs):
        size = len(g.operators)
        operators[i, :size] = [index.get(o.kind, len(names) - 1) for o in g.operators]
        numbers[i, :size] = g.numbers
        adjacency[i, :size, :size] = g.adjacency
    return OpGraphs(operators, numbers, adjacency, np.array([g.macs for g in graphs]), names)


# --- the canonical order ----------------------------------------------------------------------


def canonical(operators: Iterable[Operator]) -> OpGraph:
    """The graph of operators in any order, brought into the canonical one.

    Each operator gets a digest of what it is and of all that feeds it, and one of what it is and
    of all that it feeds; among those that are ready the least digests come first, then those whose
    inputs came first. Errors: `DataError` for a cycle.
    """
    given = tuple(operators)
    users: list[list[int]] = [[] for _ in given]
    for i, o in enumerate(given):
        for a in set(o.inputs):
            if a >= 0:
                users[a].append(i)
    order = _topological(given, users)
    up = [""] * len(given)
    for i in order:
        up[i] = _digest(given[i].line(), [up[a] if a >= 0 else "input" for a in given[i].inputs])
    down = [""] * len(given)
    for i in reversed(order):
        fed = [f"{given[u].inputs.index(i)}{down[u]}" for u in users[i]]
        down[i] = _digest(up[i], sorted(fed))
    return _ordered(given, users, down)


def _topological(given: Sequence[Operator], users: Sequence[Sequence[int]]) -> list[int]:
    waits = [len({a for a in o.inputs if a >= 0}) for o in given]
    ready = [i for i, w in enumerate(waits) if w == 0]
    order: list[int] = []
    while ready:
        i = ready.pop()
        order.append(i)
        for u in users[i]:
            waits[u] -= 1
            if waits[u] == 0:
                ready.append(u)
    if len(order) < len(given):
        raise DataError("operators feed each other in a circle: a network's graph has no cycles")
    return order


def _ordered(
    given: Sequence[Operator], users: Sequence[Sequence[int]], digests: Sequence[str]
) -> OpGraph:
    waits = [len({a for a in o.inputs if a >= 0}) for o in given]
    place: dict[int, int] = {-1: -1}

    def key(i: int) -> tuple[str, tuple[int, ...], int]:
        return digests[i], tuple(place[a] for a in given[i].inputs), i

    ready = [key(i) for i, w in enumerate(waits) if w == 0]
    heapq.heapify(ready)
    out: list[Operator] = []
    while ready:
        *_, i = heapq.heappop(ready)
        o = given[i]
        inputs = tuple(place[a] for a in o.inputs)
        out.append(Operator(o.kind, o.settings, o.weights, inputs, o.shapes, o.output))
        place[i] = len(out) - 1
        for u in users[i]:
            waits[u] -= 1
            if waits[u] == 0:
                heapq.heappush(ready, key(u))
    return OpGraph(tuple(out))


def _digest(own: str, others: Sequence[str]) -> str:
    return hashlib.blake2b("\n".join([own, *others]).encode(), digest_size=12).hexdigest()


# --- from files and programs ------------------------------------------------------------------

# they compute nothing
_PASSED = ("Identity", "Dropout")
_SETTINGS = ("kernel_shape", "strides", "group", "dilations", "axis", "pads")


def from_onnx(model: Any) -> OpGraph:
    """The operator graph of an ONNX model: a `ModelProto`, or the bytes of a file.

    Shapes are inferred where the file does not say them. Identities, dropouts and constants are no
    operators. Errors: `DataError` for bytes that hold no graph.
    """
    import onnx

    if isinstance(model, bytes):
        try:
            model = onnx.load_model_from_string(model)
        except Exception as error:
            raise DataError("these bytes are no ONNX model: give a file's content") from error
    if not model.graph.node:
        raise DataError("this ONNX model has no operators: give one that an exporter wrote")
    graph = onnx.shape_inference.infer_shapes(model).graph
    weights = {t.name: tuple(int(d) for d in t.dims) for t in graph.initializer}
    shapes = {
        value.name: tuple(int(d.dim_value) for d in value.type.tensor_type.shape.dim)
        for value in (*graph.input, *graph.value_info, *graph.output)
    }
    source = {name: i for i, node in enumerate(graph.node) for name in node.output}
    passed: dict[str, str] = {}
    for node in graph.node:
        if node.op_type == "Constant":
            weights[node.output[0]] = ()
        elif node.op_type in _PASSED:
            passed[node.output[0]] = node.input[0]

    def origin(name: str) -> str:
        while name in passed:
            name = passed[name]
        return name

    kept = [
        i for i, n in enumerate(graph.node) if n.op_type != "Constant" and n.op_type not in _PASSED
    ]
    at = {i: k for k, i in enumerate(kept)}
    found = []
    for i in kept:
        node = graph.node[i]
        data = [origin(x) for x in node.input if x and origin(x) not in weights]
        found.append(
            Operator(
                kind=node.op_type,
                settings=_settings(node),
                weights=tuple(weights[x] for x in node.input if weights.get(x)),
                inputs=tuple(at[source[x]] if x in source else -1 for x in data),
                shapes=tuple(shapes.get(x, ())[1:] for x in data),
                output=shapes.get(node.output[0], ())[1:],
            )
        )
    return canonical(found)


def _settings(node: Any) -> tuple[tuple[str, str], ...]:
    import onnx

    out = []
    for attribute in sorted(node.attribute, key=lambda a: str(a.name)):
        if attribute.name in _SETTINGS:
            value = onnx.helper.get_attribute_value(attribute)
            sizes = (
                value if isinstance(value, (list, tuple)) or hasattr(value, "__len__") else [value]
            )
            out.append((attribute.name, _text(tuple(int(v) for v in sizes))))
    return tuple(out)


# torch's names of what ONNX calls otherwise
_NAMES: Mapping[str, str] = {
    "conv2d": "Conv",
    "conv1d": "Conv",
    "convolution": "Conv",
    "linear": "Gemm",
    "addmm": "Gemm",
    "mm": "MatMul",
    "bmm": "MatMul",
    "matmul": "MatMul",
    "relu": "Relu",
    "relu_": "Relu",
    "batch_norm": "BatchNormalization",
    "_native_batch_norm_legit_no_training": "BatchNormalization",
    "add": "Add",
    "add_": "Add",
    "mul": "Mul",
    "avg_pool2d": "AveragePool",
    "max_pool2d": "MaxPool",
    "adaptive_avg_pool2d": "GlobalAveragePool",
    "flatten": "Flatten",
    "view": "Reshape",
    "reshape": "Reshape",
    "mean": "ReduceMean",
    "sigmoid": "Sigmoid",
    "softmax": "Softmax",
    "layer_norm": "LayerNormalization",
    "cat": "Concat",
}


def from_torch(program: Any) -> OpGraph:
    """The operator graph of a `torch.export.ExportedProgram`, operators named as in ONNX where it
    has them; so it is near to, but not the same as, that of the exported file."""
    state = {
        spec.arg.name for spec in program.graph_signature.input_specs if spec.target is not None
    }
    calls = [
        n
        for n in program.graph.nodes
        if n.op == "call_function"
        and _shape(n) is not None
        and _kind(n) not in ("dropout", "alias")
    ]
    at = {n: i for i, n in enumerate(calls)}
    found = []
    for n in calls:
        given = [_undropped(a) for a in n.all_input_nodes]
        data = [a for a in given if a.name not in state]
        weights = [_shape(a, batch=False) for a in given if a.name in state]
        kind = _kind(n)
        found.append(
            Operator(
                kind=_NAMES.get(kind, kind),
                settings=_torch_settings(n, kind, weights),
                weights=tuple(w for w in weights if w),
                inputs=tuple(at.get(a, -1) for a in data),
                shapes=tuple(_shape(a) or () for a in data),
                output=_shape(n) or (),
            )
        )
    return canonical(found)


def _undropped(node: Any) -> Any:
    while node.op == "call_function" and _kind(node) in ("dropout", "alias"):
        node = node.all_input_nodes[0]
    return node


def _kind(node: Any) -> str:
    name = getattr(node.target, "__name__", str(node.target))
    return str(name).split(".")[0]


def _shape(node: Any, batch: bool = True) -> Sizes | None:
    value = node.meta.get("val")
    if value is None or not hasattr(value, "shape"):
        return None
    sizes = tuple(value.shape)[1:] if batch else tuple(value.shape)
    return tuple(int(s) if isinstance(s, int) else 0 for s in sizes)


def _torch_settings(
    node: Any, kind: str, weights: Sequence[Sizes | None]
) -> tuple[tuple[str, str], ...]:
    """Kernel, strides and groups of convolutions, under ONNX's names."""
    if _NAMES.get(kind) != "Conv" or not weights or not weights[0]:
        return ()
    named = dict(zip(("strides", "pads", "dilations", "group"), node.args[3:], strict=False))
    out = {"kernel_shape": _text(weights[0][2:])}
    for name in ("strides", "group"):
        value = named.get(name, 1)
        sizes = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        if name == "strides":
            sizes = sizes * (len(weights[0]) - 2) if len(sizes) == 1 else sizes
        out[name] = _text(tuple(int(s) for s in sizes))
    return tuple(sorted(out.items()))


def _frozen(part: Any) -> Any:
    return tuple(_frozen(p) for p in part) if isinstance(part, list) else part


def _text(sizes: Sizes) -> str:
    return "x".join(str(s) for s in sizes) if sizes else "1"
