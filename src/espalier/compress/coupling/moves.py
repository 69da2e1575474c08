"""Rules of operations that move values: views, parts, concatenation; labels move with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from espalier.compress.coupling.calls import INPUT, Call, Field, Mode, along, results, vector
from espalier.compress.coupling.labels import thin
from espalier.compress.coupling.rules import rule


@rule("permute", "transpose", "t", "select", "unsqueeze", "squeeze", "unbind", "flip",
      "roll", "repeat", "unfold", "diagonal", "index_select")  # fmt: skip
def _moved(mode: Mode, call: Call, out: Any) -> bool | None:
    if mode.get(call.get("index")) or call.name.endswith("_"):
        return False
    _put(mode, out, [(call.again(f.labels), f.own) for f in mode.get(call["self"])])
    return None


@rule("expand")
def _expanded(mode: Mode, call: Call, out: Any) -> None:
    x = call["self"]
    moved = [(call.again(f.labels), f.own) for f in mode.get(x)]
    before = [1] * (out.dim() - x.dim()) + list(x.shape)
    for dim, size in enumerate(out.shape):
        if before[dim] == 1 < size:
            # copies: as many as what they meet needs, so they have labels that no tensor owns
            moved.append((along(mode.labels.new(size), dim, out.shape), False))
    _put(mode, out, moved)


def _put(mode: Mode, out: Any, moved: Sequence[tuple[Any, bool]]) -> None:
    for i, result in enumerate(results(out)):
        mode.put(result, [Field(m if isinstance(m, Tensor) else m[i], own) for m, own in moved])


def boxed(labels: Tensor, dim: int, sizes: tuple[int, int]) -> Tensor:
    """One dim as two, as `Tensor.unflatten`."""
    return labels.unflatten(dim, sizes)  # type: ignore[no-untyped-call, no-any-return]


@rule("view", "_unsafe_view", "_reshape_alias", "reshape")
def _viewed(mode: Mode, call: Call, out: Any) -> None:
    fields = mode.get(call["self"])
    for i, f in enumerate(fields):
        for g in fields[i + 1 :]:
            _merged(mode, f.labels, g.labels, out)
    moved = [(f.labels.reshape(out.shape), f.own) for f in fields]
    for labels, _ in moved:
        mode.labels.grid(labels)  # a dim of channels may have become a box
    _put(mode, out, moved)


def _merged(mode: Mode, f: Tensor, g: Tensor, out: Tensor) -> None:
    """Two dims of channels that become one can't both be cut: heads that share their values, say,
    are cut by head."""
    labels = mode.labels
    if labels.varying(f) & labels.varying(g):
        return
    if labels.varying(f.reshape(out.shape)) & labels.varying(g.reshape(out.shape)):
        by_head = bool(mode.trace.attended & set(np.unique(thin(g)[0].numpy()).tolist()))
        labels.lock(f if by_head else g, "one dim with other channels, such as heads")


@rule("split", "split_with_sizes", "chunk")
def _split(mode: Mode, call: Call, out: Any) -> None:
    x = call["self"]
    dim = call.get("dim", 0) % x.dim()
    sizes = {part.shape[dim] for part in results(out)}
    for f in mode.get(x):
        if dim in mode.labels.named(f.labels):
            mode.labels.parts(f.labels, dim, sizes)
    _put(mode, out, [(call.again(f.labels), f.own) for f in mode.get(x)])


@rule("slice")
def _slice(mode: Mode, call: Call, out: Any) -> None:
    x, dim = call["self"], call.get("dim", 0) % call["self"].dim()
    size, part = x.shape[dim], out.shape[dim]
    if call.get("step", 1) == 1 and 0 < part < size:
        known = dim in mode.trace.slices.setdefault(x, {})
        mode.trace.slices[x].setdefault(dim, set()).add(part)
        for f in mode.get(x) if not known else ():
            if dim in mode.labels.named(f.labels):
                mode.labels.parts(f.labels, dim, mode.trace.slices[x][dim])
    _put(mode, out, [(call.again(f.labels), f.own) for f in mode.get(x)])


@rule("cat")
def _cat(mode: Mode, call: Call, out: Any) -> None:
    tensors = [t for t in call["tensors"] if t.dim() == out.dim() and t.numel()]
    _joined(
        mode, [[f.labels for f in mode.get(t)] for t in tensors], tensors, call.get("dim", 0), out
    )


@rule("stack")
def _stack(mode: Mode, call: Call, out: Any) -> None:
    dim = call.get("dim", 0) % out.dim()
    tensors = [t.unsqueeze(dim) for t in call["tensors"]]
    fields = [[f.labels.unsqueeze(dim) for f in mode.get(t)] for t in call["tensors"]]
    _joined(mode, fields, tensors, dim, out)


def _joined(
    mode: Mode, fields: list[list[Tensor]], tensors: list[Tensor], dim: int, out: Tensor
) -> None:
    """Along `dim` labels follow one another; along the other dims those of all parts meet."""
    dim, labels = dim % out.dim(), mode.labels
    across = [[f for f in side if labels.named(f) - {dim}] for side in fields]
    ends = [f for side in across for f in side]
    made = [Field(f.narrow(dim, 0, 1).expand(out.shape)) for f in ends[:1]]
    for f in ends:
        if dim in labels.named(f):
            labels.level(f, {dim})  # channels in two dims of one part: cut along the other only
        made.append(Field(f.narrow(dim, 0, 1).expand(out.shape)))
    for i, one in enumerate(across):
        for two in across[i + 1 :]:
            _meet(mode, one, two, dim)
    rows = []
    for side, tensor in zip(fields, tensors, strict=True):
        here = [f for f in side if labels.named(f) == {dim}]
        size = tensor.shape[dim]
        rows.append(vector(here[0], dim) if here else torch.zeros(size, dtype=torch.int64))
        for more in here[1:]:
            labels.join(vector(here[0], dim), vector(more, dim))
    made.append(Field(along(torch.cat(rows), dim, out.shape)))
    mode.put(out, made)


def _meet(mode: Mode, one: list[Tensor], two: list[Tensor], dim: int) -> None:
    labels = mode.labels
    for f in one:
        for g in two:
            if (labels.named(f) & labels.named(g)) - {dim}:
                labels.same(f.select(dim, 0), g.select(dim, 0))
    for fields, against in ((one, two), (two, one)):
        covered = set().union(*(labels.named(g) for g in against)) | {dim}
        for f in fields:
            labels.fixed(f, labels.named(f) - covered, INPUT)


@rule("pixel_shuffle")
def _pixel_shuffle(mode: Mode, call: Call, out: Any) -> None:
    moved = []
    for f in mode.get(call["self"]):
        if mode.labels.named(f.labels) == {out.dim() - 3}:
            boxes = vector(f.labels, -3).view(out.shape[-3], -1)
            mode.labels.level(boxes, {1})
            moved.append((along(boxes[:, 0], -3, out.shape), False))
        else:
            mode.labels.lock(f.labels, "shuffled from channels to places")
    _put(mode, out, moved)


@rule("pixel_unshuffle")
def _pixel_unshuffle(mode: Mode, call: Call, out: Any) -> None:
    moved = []
    for f in mode.get(call["self"]):
        if mode.labels.named(f.labels) == {out.dim() - 3}:
            times = out.shape[-3] // f.labels.shape[-3]
            labels = vector(f.labels, -3).repeat_interleave(times)
            moved.append((along(labels, -3, out.shape), False))
        else:
            mode.labels.lock(f.labels, "shuffled from places to channels")
    _put(mode, out, moved)


@rule("channel_shuffle", "native_channel_shuffle")
def _channel_shuffle(mode: Mode, call: Call, out: Any) -> None:
    moved = []
    for f in mode.get(call["self"]):
        boxes = boxed(f.labels, 1, (call["groups"], -1))
        mode.labels.grid(boxes)
        moved.append((boxes.transpose(1, 2).flatten(1, 2), False))
    _put(mode, out, moved)


@rule("view_as_complex")
def _complex(mode: Mode, call: Call, out: Any) -> None:
    last = call["self"].dim() - 1
    for f in mode.get(call["self"]):
        mode.labels.level(f.labels, {last})
    _put(mode, out, [(f.labels.select(last, 0), False) for f in mode.get(call["self"])])


@rule("view_as_real")
def _real(mode: Mode, call: Call, out: Any) -> None:
    fields = mode.get(call["self"])
    _put(mode, out, [(f.labels.unsqueeze(-1).expand(out.shape), False) for f in fields])


@rule("glu")
def _gated(mode: Mode, call: Call, out: Any) -> None:
    x, moved = call["self"], []
    dim = call.get("dim", -1) % x.dim()
    for f in mode.get(x):
        halves = f.labels.chunk(2, dim)
        if dim in mode.labels.named(f.labels):
            mode.labels.same(*halves)
        moved.append((halves[0], False))
    _put(mode, out, moved)
