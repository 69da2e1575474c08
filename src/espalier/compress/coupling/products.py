"""Rules of matrix products and convolutions: where labels of inputs and outputs meet."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from espalier.compress.coupling.calls import (
    INPUT,
    KERNEL,
    Call,
    Field,
    Mode,
    along,
    couple,
    met,
    vector,
)
from espalier.compress.coupling.labels import thin
from espalier.compress.coupling.rules import rule


@rule("bmm", "mm", "mv")
def _product(mode: Mode, call: Call, out: Any) -> None:
    mode.put(
        out,
        _contracted(mode, call["self"], call["mat2"] if "mat2" in call.named else call["vec"], out),
    )


@rule("addmm", "baddbmm", "addmv")
def _added_product(mode: Mode, call: Call, out: Any) -> None:
    keys = {"addmm": ("mat1", "mat2"), "baddbmm": ("batch1", "batch2"), "addmv": ("mat", "vec")}
    one, two = keys[call.name.rstrip("_")]
    mode.put(out, _contracted(mode, call[one], call[two], out))
    mode.put(out, _with(mode, out, call["self"]))


def _with(mode: Mode, out: Tensor, bias: Tensor) -> list[Field]:
    return met(mode, [out, bias], out.shape)


def _contracted(mode: Mode, one: Tensor, two: Tensor, out: Tensor) -> list[Field]:
    """The fields of `one (b, n, k) @ two (b, k, m)`, in the shape of `out`.

    Channels that are contracted meet their weights' inputs. Channels of several heads that are
    contracted by head go together, and their head lives on in the product.
    """
    wide = two if two.dim() > 1 else two.unsqueeze(1)
    batch = one.shape[0] if one.dim() == 3 else 1
    shape = (batch, one.shape[-2], wide.shape[-1])
    left = [_three(f, one) for f in mode.get(one)]
    right = [_three(f, two) for f in mode.get(two)]
    passed = [_inner(mode, left, 2), _inner(mode, right, 1)]
    inner = [[vector(f.labels, 2 - i) for f in found] for i, (found, _) in enumerate(passed)]
    couple(mode, inner[0], {0}, inner[1], {0})
    sides = [[f.expand(shape) for f in outer] for _, outer in passed]
    real = [{0, 1}, {0, 2}] if batch > 1 else [{1}, {2}]
    couple(mode, sides[0], real[0], sides[1], real[1])
    return [Field(f.reshape(out.shape)) for side in sides for f in side]


def _three(field: Field, tensor: Tensor) -> Field:
    labels = field.labels.unsqueeze(-1) if tensor.dim() == 1 else field.labels
    return Field(labels if labels.dim() == 3 else labels.unsqueeze(0), field.own)


def _inner(mode: Mode, fields: list[Field], k: int) -> tuple[list[Field], list[Tensor]]:
    """Which fields are contracted channel by channel, and what of the others lives on."""
    inner, outer = [], []
    for f in fields:
        varying = mode.labels.varying(f.labels)
        if k in varying and varying == {k}:
            inner.append(f)
            if f.own:
                mode.trace.consumed |= set(vector(f.labels, k).tolist())
            continue
        if 0 in varying:
            mode.trace.attended |= set(np.unique(thin(f.labels)[0].numpy()).tolist())
        if k in varying:
            mode.labels.level(f.labels, {k})
        outer.append(f.labels.narrow(k, 0, 1))
    return inner, outer


@rule("convolution", "_convolution")
def _convolution(mode: Mode, call: Call, out: Any) -> bool | None:
    x, w = call["input"], call["weight"]
    transposed, groups = call["transposed"], call["groups"]
    found = [f.labels for f in mode.get(x)]
    for f in found:
        mode.labels.fixed(f, mode.labels.named(f) - {1}, "convolved as if channels were places")
    channels = [vector(f, 1) for f in found if 1 in mode.labels.named(f)]
    ins, outs = (0, 1) if transposed else (1, 0)
    dims: dict[int, Tensor] = {}
    for g in mode.get(w):
        mode.labels.fixed(g.labels, mode.labels.named(g.labels) - {0, 1}, KERNEL)
        for dim in mode.labels.named(g.labels) & {0, 1}:
            dims[dim] = vector(g.labels, dim)
    if groups > 1 and (transposed or (ins not in dims and w.shape[1] > 1)):
        return False
    if groups > 1:
        _grouped(mode, channels, dims.get(0), dims.get(1), groups, w)
    else:
        if ins in dims:
            mode.trace.consumed |= set(dims[ins].tolist())
        weights = [dims[ins]] if ins in dims else []
        couple(mode, channels, {0}, weights, {0})
    made = [Field(along(dims[outs], 1, out.shape))] if outs in dims else []
    mode.put(out, made)
    for b in mode.get(call.get("bias")):
        couple(mode, [f.labels for f in made], {1}, [along(b.labels, 1, out.shape)], {1})
    return None


def _grouped(
    mode: Mode,
    channels: list[Tensor],
    outs: Tensor | None,
    ins: Tensor | None,
    groups: int,
    w: Tensor,
) -> None:
    """Depthwise: an input goes with its outputs. Otherwise all groups lose channels alike."""
    if outs is None:
        return
    per_group = w.shape[1]
    if per_group == 1:
        wanted = [c.repeat_interleave(len(outs) // groups) for c in channels]
        couple(mode, wanted, {0}, [outs], {0})
        return
    mode.labels.level(outs.view(groups, -1), {0})
    if ins is not None:
        mode.trace.consumed |= set(ins.tolist())
        across = ins.expand(groups, per_group)
        for c in channels:
            box = c.view(groups, per_group)
            mode.labels.level(box, {0})
            mode.labels.join(box, across)
        if not channels:
            mode.labels.lock(ins, INPUT)
