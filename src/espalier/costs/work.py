"""What a piece of a network asks of a machine, in numbers that time depends on."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.costs.record import ROUNDING, Operation, Record

FEATURES = (
    "convolutions",
    "pointwise_macs",
    "pointwise_macs_16",
    "dense_macs",
    "dense_macs_16",
    "depthwise_macs",
    "depthwise_macs_16",
    "product_macs",
    "weight_elements",
    "convolved_elements",
    "other_operations",
    "other_elements",
    "input_elements",
    "output_elements",
    "input_ragged",
    "output_ragged",
    "integer_macs_16",
    "integer_elements",
)


def features(run: Record) -> NDArray[np.float64]:
    """The work of a piece, one number for each of `FEATURES`, summed over its operations.

    Runtimes compute channels in blocks, so `_16` counts multiply-accumulates with channels rounded
    up to a multiple of 16; `ragged` elements are those of tensors whose channels fill no block of
    8, which a runtime has to reorder. Convolutions and products of rounded tensors count as
    `integer` work only.
    """
    total = dict.fromkeys(FEATURES, 0.0)
    rounded: set[int] = set()
    for operation in run.operations:
        if operation.name.startswith(ROUNDING):
            rounded.update(operation.reads)
        whole = not rounded.isdisjoint(operation.reads)
        for name, amount in _work(operation, whole).items():
            total[name] += amount
    if run.operations:
        _ends(total, run.operations[0].in_shape, run.operations[-1].out_shape)
    return np.array([total[name] for name in FEATURES])


def _work(operation: Operation, whole: bool) -> dict[str, float]:
    size = float(math.prod(operation.out_shape))
    if operation.macs == 0:
        # batch-norms are folded into convolutions; views do nothing
        idle = "norm" in operation.name or not set(operation.writes) - set(operation.reads)
        return {} if idle else {"other_operations": 1.0, "other_elements": size}
    if whole:
        return _integer(operation)
    if "convolution" not in operation.name:
        return {
            "convolutions": 1.0,
            "product_macs": float(operation.macs),
            "convolved_elements": size,
        }
    (_, channels, *_), weight = operation.shapes[:2]
    kernel, places = math.prod(weight[2:]), size / max(operation.out_shape[1], 1)
    depthwise = weight[1] == 1 and channels > 1
    kind = "depthwise" if depthwise else "pointwise" if kernel == 1 else "dense"
    inner = 1 if depthwise else _blocks(weight[1])
    return {
        "convolutions": 1.0,
        f"{kind}_macs": float(operation.macs),
        f"{kind}_macs_16": places * kernel * inner * _blocks(operation.out_shape[1]),
        "weight_elements": float(math.prod(weight)),
        "convolved_elements": size + float(math.prod(operation.in_shape)),
    }


def _integer(operation: Operation) -> dict[str, float]:
    """The work of a convolution or product of rounded tensors; channels are rounded up to 16."""
    convolution = "convolution" in operation.name
    source = operation.in_shape if convolution else operation.shapes[-2]  # a bias may come first
    channels = 1 if convolution else -1
    inputs, outputs = source[channels], operation.out_shape[channels]
    blocked = _blocks(inputs) * _blocks(outputs) / max(inputs * outputs, 1)
    return {
        "convolutions": 1.0,
        "integer_macs_16": operation.macs * blocked,
        "integer_elements": float(math.prod(operation.out_shape) + math.prod(source)),
    }


def _blocks(channels: int) -> int:
    return -(-channels // 16) * 16


def _ends(total: dict[str, float], first: tuple[int, ...], last: tuple[int, ...]) -> None:
    for name, shape in (("input", first), ("output", last)):
        total[f"{name}_elements"] = float(math.prod(shape))
        if len(shape) > 1 and shape[1] % 8:
            total[f"{name}_ragged"] = float(math.prod(shape))


def fingerprint(run: Record) -> str:
    """16 hex digits of what a piece computes and on which shapes; weights' values don't matter.

    Two pieces with one fingerprint are the same program for a runtime: same operators with the
    same settings and shapes, wired in the same way.
    """
    numbers: dict[int, int] = {}

    def renumbered(storages: tuple[int, ...]) -> list[int]:
        return [numbers.setdefault(s, len(numbers)) for s in storages]

    lines: list[Any] = [renumbered(run.inputs)]
    for o in run.operations:
        wires = renumbered(o.reads), renumbered(o.writes)
        lines.append((o.name, o.shapes, o.out_shape, o.settings, wires))
    lines.append(renumbered(run.outputs))
    return hashlib.sha256(repr(lines).encode()).hexdigest()[:16]
