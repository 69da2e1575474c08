"""A network layer by layer, in order of execution: what a drawing of it needs."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor, nn

from espalier.costs.record import Layer, Operation, Record, record


def layers(network: nn.Module, example: Tensor) -> list[dict[str, Any]]:
    """Rows of the network's layers and of operations outside of layers (additions, products).

    A row has name, kind, in_shape and out_shape (without batch), kernel, stride, groups (None
    where there is none), params and macs of one input. Kinds: conv, depthwise, linear, attention,
    norm, activation, pool, resize, add, multiply, matmul, concat, other. What only changes the
    shape, or does nothing when deployed (identity, dropout), has no row.
    """
    run = record(network, example[:1])
    rows: list[dict[str, Any]] = []
    shown: set[int] = set()
    seen: set[nn.Module] = set()
    loose: Counter[str] = Counter()
    prefix = ""
    for operation in run.operations:
        if operation.layer >= 0:
            layer = run.layers[operation.layer]
            prefix = layer.name.rpartition(".")[0]
            if operation.layer not in shown and _matters(run, operation.layer):
                rows.append(_layer_row(layer, run, operation.layer, layer.module not in seen))
                seen.add(layer.module)
            shown.add(operation.layer)
        elif kind := _LOOSE.get(operation.name.rstrip("_")):
            name = f"{prefix}.{kind}" if prefix else kind
            loose[name] += 1
            rows.append(_loose_row(operation, kind, name, loose[name]))
    return rows


_LOOSE = {
    "add": "add",
    "mul": "multiply",
    "mm": "matmul",
    "bmm": "matmul",
    "addmm": "matmul",
    "convolution": "conv",
    "_softmax": "softmax",
    "_scaled_dot_product_flash_attention_for_cpu": "attention",
    "cat": "concat",
    "mean": "pool",
    "max_pool2d_with_indices": "pool",
    "avg_pool2d": "pool",
    "_adaptive_avg_pool2d": "pool",
    "relu": "activation",
    "hardtanh": "activation",
    "gelu": "activation",
    "silu": "activation",
    "hardswish": "activation",
    "sigmoid": "activation",
    "native_layer_norm": "norm",
    "native_batch_norm": "norm",
    "upsample_nearest2d": "resize",
    "upsample_bilinear2d": "resize",
}


def kind_of(module: nn.Module) -> str:
    """What a module is, in one word."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return "depthwise" if 1 < module.groups == module.in_channels else "conv"
    for cls in type(module).__mro__:  # a subclass of torch's norm is a norm, whatever its name
        for word, kind in _WORDS.items():
            if word in cls.__name__:
                return kind
        if cls.__module__.endswith("modules.activation"):
            return "activation"
    return "other"


_WORDS = {
    "Attention": "attention",
    "Linear": "linear",
    "Norm": "norm",
    "Pool": "pool",
    "Upsample": "resize",
    "Conv": "conv",
}


def _matters(run: Record, index: int) -> bool:
    """Whether the layer computes anything: more than views, copies and moves."""
    idle = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Flatten)
    return not isinstance(run.layers[index].module, idle)


def _layer_row(layer: Layer, run: Record, index: int, first: bool) -> dict[str, Any]:
    module = layer.module
    return {
        "name": layer.name,
        "kind": kind_of(module),
        "in_shape": list(layer.in_shape[1:]),
        "out_shape": list(layer.out_shape[1:]),
        "kernel": _plain(getattr(module, "kernel_size", None)),
        "stride": _plain(getattr(module, "stride", None)),
        "groups": getattr(module, "groups", None),
        # a module called twice has its parameters once
        "params": sum(p.numel() for p in module.parameters()) if first else 0,
        "macs": sum(o.macs for o in run.operations if o.layer == index),
    }


def _loose_row(operation: Operation, kind: str, name: str, number: int) -> dict[str, Any]:
    return {
        "name": name if number == 1 else f"{name}_{number}",
        "kind": kind,
        "in_shape": list(operation.in_shape[1:]),
        "out_shape": list(operation.out_shape[1:]),
        "kernel": None,
        "stride": None,
        "groups": None,
        "params": 0,
        "macs": operation.macs,
    }


def _plain(value: Any) -> Any:
    """3 for (3, 3), [3, 5] for (3, 5), 3 for 3."""
    if isinstance(value, (tuple, list)):
        return value[0] if len(set(value)) == 1 else list(value)
    return value
