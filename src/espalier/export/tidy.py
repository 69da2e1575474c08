"""What an exporter leaves in an ONNX model that its user should not have to carry."""

from __future__ import annotations

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
    for node in graph.node:
        if node.op_type != "ReduceMean" or len(node.input) < 2 or ranks.get(node.input[0]) != 4:
            continue
        settings = {a.name: a.i for a in node.attribute}
        axes = constants.get(node.input[1])
        if axes is None or not settings.get("keepdims", 1):
            continue
        if sorted(int(a) % 4 for a in onnx.numpy_helper.to_array(axes).ravel()) == [2, 3]:
            node.op_type = "GlobalAveragePool"
            del node.input[1:]
            del node.attribute[:]
    used = {name for node in graph.node for name in node.input}
    for name in set(constants) - used:
        graph.initializer.remove(constants[name])
