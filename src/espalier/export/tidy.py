"""What an exporter leaves in an ONNX model that its user should not have to carry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx


def tidied(model: Any, dynamic: bool) -> Any:
    """The model, in place, as it is handed out.

    - Notes of the exporter go: they are larger than a small network, and hold the paths of the
      machine it was exported on.
    - A dynamic first dimension is called "batch", whatever torch called it.
    - Means over height and width become GlobalAveragePool: runtimes keep their blocked layout of
      channels through it, and turn it back before a ReduceMean.
    """
    graph = model.graph
    _pool(graph)
    for holder in (model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        holder.ClearField("metadata_props")
        holder.ClearField("doc_string")
    graph.ClearField("value_info")
    if dynamic:
        for value in (*graph.input, *graph.output):
            dims = value.type.tensor_type.shape.dim
            if len(dims) and not dims[0].HasField("dim_value"):
                dims[0].dim_param = "batch"
    return model


def _pool(graph: Any) -> None:
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in (*graph.input, *graph.value_info)}
    constants = {t.name: t for t in graph.initializer}
    nodes: list[Any] = []
    for node in graph.node:
        nodes.append(node)
        if node.op_type != "ReduceMean" or ranks.get(node.input[0]) != 4:
            continue
        axes, keeps = _mean(node, constants)
        if axes != [2, 3]:
            continue
        node.op_type = "GlobalAveragePool"
        del node.input[1:]
        del node.attribute[:]
        if not keeps:
            given = node.output[0]
            node.output[0] = f"{given}_pooled"
            nodes.append(onnx.helper.make_node("Flatten", [node.output[0]], [given], axis=1))
    if len(nodes) > len(graph.node):
        copies = [_copy(node) for node in nodes]
        del graph.node[:]
        graph.node.extend(copies)
    used = {name for node in graph.node for name in node.input}
    for name in set(constants) - used:
        graph.initializer.remove(constants[name])


def _mean(node: Any, constants: Mapping[str, Any]) -> tuple[list[int], bool]:
    """The axes of a ReduceMean over an image, sorted (none where unknown); whether they stay."""
    settings = {a.name: a for a in node.attribute}
    keeps = bool(settings["keepdims"].i) if "keepdims" in settings else True
    axes: list[int] = list(settings["axes"].ints) if "axes" in settings else []
    if len(node.input) > 1 and node.input[1] in constants:
        axes = [int(a) for a in onnx.numpy_helper.to_array(constants[node.input[1]]).ravel()]
    return sorted(axis % 4 for axis in axes), keeps


def _copy(node: Any) -> Any:
    made = onnx.NodeProto()
    made.CopyFrom(node)
    return made
