"""The operators of ONNX as torch's layers, where they have weights, and as torch's functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional

from espalier.errors import DataError
from espalier.flows.onnx_sizes import COMPUTED, Attributes, Sizes

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
    return _gemm(given[:2], {})


def _batch_norm(given: Sequence[Any], more: Attributes) -> nn.Module:
    kind: Any = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 5: nn.BatchNorm3d}.get(
        more.get("rank") or 4, nn.BatchNorm2d
    )
    layer = kind(len(given[1]), eps=more.get("epsilon", 1e-5))
    names = ("weight", "bias", "running_mean", "running_var")
    return _filled(layer, **dict(zip(names, given[1:5], strict=True)))


def _layer_norm(given: Sequence[Any], more: Attributes) -> nn.Module:
    weight, bias = given[1], given[2] if len(given) > 2 else None
    axis = more.get("axis", -1)
    if axis < 0 and -axis != weight.dim():
        raise DataError("an ONNX LayerNormalization with broadcast weights can't be read")
    layer = nn.LayerNorm(list(weight.shape), more.get("epsilon", 1e-5), bias=bias is not None)
    return _filled(layer, weight=weight, bias=bias)


def _filled(layer: nn.Module, **tensors: Tensor | None) -> nn.Module:
    with torch.no_grad():
        for name, tensor in tensors.items():
            if tensor is not None:
                getattr(layer, name).copy_(tensor)
    return layer


LAYERS: dict[str, Callable[[Sequence[Any], Attributes], nn.Module]] = {
    "Conv": _convolution,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "BatchNormalization": _batch_norm,
    "LayerNormalization": _layer_norm,
}

# --- functions ---------------------------------------------------------------------------------


def _ints(value: Any) -> list[Any]:
    """Whole numbers; among sizes there can be proxies."""
    if isinstance(value, Sizes):
        return list(value.items)
    return [int(v) for v in value.reshape(-1).tolist()]


def _operand(value: Any) -> Any:
    """A number that was computed from shapes stands beside tensors as it is."""
    if not isinstance(value, Sizes):
        return value
    if len(value.items) != 1:
        raise DataError("an ONNX file that computes with shapes as values can't be read")
    return value.items[0]


def _axes(given: Sequence[Any], more: Attributes) -> list[int]:
    """Axes are an input, in older files an attribute."""
    if len(given) > 1 and given[1] is not None:
        return _ints(given[1])
    if "axes" not in more:
        raise DataError("an ONNX operator without its axes can't be read")
    return list(more["axes"])


def _reshape(given: Sequence[Any], more: Attributes) -> Tensor:
    x, shape = given[0], _ints(given[1])
    sizes = [
        x.shape[i] if isinstance(s, int) and s == 0 and not more.get("allowzero") else s
        for i, s in enumerate(shape)
    ]
    fixed = all(isinstance(s, int) and s > 0 for s in sizes)
    if sizes and fixed and sizes[0] == (more["batch"] or 1):
        sizes[0] = -1  # exported for one batch: any batch
    return torch.reshape(x, sizes)


def _expand(given: Sequence[Any], more: Attributes) -> Any:
    x, sizes = given[0], _ints(given[1])
    if more["rank"] is None:
        raise DataError("an ONNX Expand of a value whose dimensions are not known can't be read")
    new = len(sizes) - more["rank"]
    if new < 0:  # ONNX also lets the shape be the shorter of the two
        sizes, new = [1] * -new + sizes, 0
    # 1 keeps what is there
    return x.expand([
        -1 if i >= new and isinstance(s, int) and s == 1 else s for i, s in enumerate(sizes)
    ])  # fmt: skip


def _gather(given: Sequence[Any], more: Attributes) -> Any:
    x, index = given[:2]
    axis = more.get("axis", 0)
    places = _ints(index) if isinstance(index, (Tensor, Sizes)) else []
    if not places or not all(isinstance(i, int) for i in places):
        raise DataError("an ONNX Gather with computed places, as of an embedding, can't be read")
    if index.scalar if isinstance(index, Sizes) else index.dim() == 0:
        return torch.select(x, axis, places[0])
    if places != list(range(places[0], places[0] + len(places))) or places[0] < 0:
        raise DataError(f"an ONNX Gather of the places {places[:8]} can't be read")
    return torch.narrow(x, axis, places[0], len(places))


def _slice(given: Sequence[Any], more: Attributes) -> Any:
    x, rest = given[0], [_ints(v) if v is not None else None for v in given[1:]]
    if not rest:  # an older file
        rest = [list(more["starts"]), list(more["ends"]), more.get("axes")]
    starts, ends = rest[0] or [], rest[1] or []
    axes = (rest[2] if len(rest) > 2 else None) or list(range(len(starts)))
    steps = (rest[3] if len(rest) > 3 else None) or [1] * len(starts)
    if any(isinstance(s, int) and s < 1 for s in steps):
        raise DataError("an ONNX Slice that goes backwards can't be read")
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        x = torch.ops.aten.slice.Tensor(x, axis, start, end, step)
    return x


def _split(given: Sequence[Any], more: Attributes) -> list[Any]:
    axis = more.get("axis", 0)
    sizes = _ints(given[1]) if len(given) > 1 and given[1] is not None else more.get("split")
    if sizes is None and "num_outputs" not in more:
        raise DataError("an ONNX Split without sizes can't be read")
    count = len(sizes) if sizes is not None else int(more["num_outputs"])
    parts = (
        torch.chunk(given[0], count, axis)
        if sizes is None
        else torch.split(given[0], list(sizes), axis)
    )
    return [parts[i] for i in range(count)]


def _unsqueeze(given: Sequence[Any], more: Attributes) -> Any:
    axes, x = _axes(given, more), given[0]
    # axes are those of the answer: from the near end of each side
    for axis in sorted(a for a in axes if a >= 0) + sorted(
        (a for a in axes if a < 0), reverse=True
    ):
        x = torch.unsqueeze(x, axis)
    return x


def _cast(given: Sequence[Any], more: Attributes) -> Any:
    if more["to"] != onnx.TensorProto.FLOAT:
        raise DataError("an ONNX Cast of values to another type than float can't be read")
    return given[0]


def _pool(kind: str) -> Callable[[Sequence[Any], Attributes], Any]:
    """Pooling by the `max` or the `avg` of as many dims as the kernel has."""

    def pool(given: Sequence[Any], more: Attributes) -> Any:
        kernel = list(more["kernel_shape"])
        if more.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
            raise DataError("an ONNX pooling with auto_pad can't be read")
        pads = list(more.get("pads", [0] * 2 * len(kernel)))
        if pads[: len(kernel)] != pads[len(kernel) :] or more.get("ceil_mode", 0):
            raise DataError("an ONNX pooling with uneven pads or ceil_mode can't be read")
        strides = list(more.get("strides", [1] * len(kernel)))
        settings: dict[str, Any] = {}
        dilations = list(more.get("dilations", [1] * len(kernel)))
        if kind == "avg":
            settings["count_include_pad"] = bool(more.get("count_include_pad", 0))
            if max(dilations) > 1:
                raise DataError("an ONNX average pooling with dilations can't be read")
        else:
            settings["dilation"] = dilations
        function = getattr(functional, f"{kind}_pool{len(kernel)}d")
        return function(given[0], kernel, strides, pads[: len(kernel)], **settings)

    return pool


def _reduce_mean(given: Sequence[Any], more: Attributes) -> Tensor:
    out: Tensor = given[0].mean(_axes(given, more), keepdim=bool(more.get("keepdims", 1)))
    return out


def _clip(given: Sequence[Any], more: Attributes) -> Tensor:
    low, high = (
        given[i] if len(given) > i and given[i] is not None else more.get(name)
        for i, name in ((1, "min"), (2, "max"))
    )
    return torch.clamp(given[0], low, high)


CALLS: dict[str, Callable[[Sequence[Any], Attributes], Any]] = {
    "Relu": lambda g, m: torch.relu(g[0]),
    "LeakyRelu": lambda g, m: functional.leaky_relu(g[0], m.get("alpha", 0.01)),
    "Sigmoid": lambda g, m: torch.sigmoid(g[0]),
    "Tanh": lambda g, m: torch.tanh(g[0]),
    "Gelu": lambda g, m: functional.gelu(g[0], approximate=m.get("approximate", b"none").decode()),
    "Erf": lambda g, m: torch.erf(g[0]),
    "Sqrt": lambda g, m: torch.sqrt(g[0]),
    "Pow": lambda g, m: torch.pow(g[0], _operand(g[1])),
    "HardSwish": lambda g, m: functional.hardswish(g[0]),
    "HardSigmoid": lambda g, m: torch.clamp(g[0] * m.get("alpha", 0.2) + m.get("beta", 0.5), 0, 1),
    "Softmax": lambda g, m: torch.softmax(g[0], m.get("axis", -1)),
    "Clip": _clip,
    "Add": lambda g, m: _operand(g[0]) + _operand(g[1]),
    "Sub": lambda g, m: _operand(g[0]) - _operand(g[1]),
    "Mul": lambda g, m: _operand(g[0]) * _operand(g[1]),
    "Div": lambda g, m: _operand(g[0]) / _operand(g[1]),
    "MatMul": lambda g, m: torch.matmul(g[0], g[1]),
    "Concat": lambda g, m: torch.cat(list(g), m["axis"]),
    "Flatten": lambda g, m: torch.flatten(g[0], m.get("axis", 1)),
    "Reshape": _reshape,
    "Expand": _expand,
    "Gather": _gather,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": lambda g, m: torch.squeeze(g[0], _axes(g, m)),
    "Unsqueeze": _unsqueeze,
    "Cast": _cast,
    "Transpose": lambda g, m: g[0].permute(*m["perm"]),
    "Identity": lambda g, m: g[0],
    "Dropout": lambda g, m: g[0],
    "ReduceMean": _reduce_mean,
    "GlobalAveragePool": lambda g, m: g[0].mean(tuple(range(2, m["rank"])), keepdim=True),
    "AveragePool": _pool("avg"),
    "MaxPool": _pool("max"),
}

OPERATORS = tuple(sorted({"Constant", "Shape", *LAYERS, *CALLS, *COMPUTED}))
