"""How each operation of torch treats the labels of channels (see `labelling`).

A rule gets the mode, the call and its output; it puts the output's fields, and gives False where it
doesn't know.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from espalier.compress.coupling.calls import (
    INPUT,
    TABLE,
    Call,
    Field,
    Mode,
    along,
    met,
    results,
    spread,
    vector,
)

Rule = Callable[[Any, Call, Any], bool | None]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operations."""

    def add(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return add


def rule_of(call: Call) -> Rule | None:
    """The rule of an operation, or None."""
    name = call.name
    found = RULES.get(name)
    if found is None and name.endswith("_"):
        found = RULES.get(name[:-1])
    if found is None and torch.Tag.pointwise in call.func.tags:
        found = elementwise
    return found


# --- place by place ------------------------------------------------------------------------------


@rule("copy", "_prelu_kernel", "dropout", "where", "hardswish", "hardsigmoid", "hardtanh", "silu",
      "mish", "softplus", "elu", "celu", "selu", "leaky_relu", "threshold", "relu6", "gelu",
      "nan_to_num", "complex", "polar", "masked_fill")  # fmt: skip
def elementwise(mode: Mode, call: Call, out: Any) -> bool | None:
    """Operations by elements, with broadcasting; in place too."""
    found = results(out)
    values = call.named.values()
    if any(isinstance(v, (list, tuple)) and any(isinstance(t, Tensor) for t in v) for v in values):
        return False
    if not found or any(r.shape != found[0].shape for r in found):
        return False
    fields = met(mode, [t for t in values if isinstance(t, Tensor)], found[0].shape)
    for result in found:
        mode.put(result, fields)
    return None


@rule("_to_copy", "clone", "alias", "detach", "lift_fresh", "contiguous", "zeros_like", "zero",
      "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "fill")  # fmt: skip
def _unchanged(mode: Mode, call: Call, out: Any) -> None:
    mode.put(out, mode.get(call["self"]))


@rule("as_strided")
def _restrided(mode: Mode, call: Call, out: Any) -> bool | None:
    if tuple(call["size"]) != tuple(out.shape) or not call.name.endswith("_"):
        return False
    fields = mode.get(call["self"])
    if any(f.labels.shape != out.shape for f in fields):
        return False
    mode.put(out, fields)  # pooling to one place only sets strides
    return None


@rule("new_zeros", "new_ones", "new_empty", "new_full")
def _nothing(mode: Mode, call: Call, out: Any) -> None:
    mode.put(out, [])


@rule("_softmax", "_log_softmax", "_safe_softmax", "cumsum", "logcumsumexp")
def _running(mode: Mode, call: Call, out: Any) -> None:
    for f in mode.get(call["self"]):
        mode.labels.fixed(f.labels, {call["dim"] % out.dim()}, "a softmax or sum over channels")
    mode.put(out, [Field(f.labels) for f in mode.get(call["self"])])


@rule("tril", "triu")
def _triangle(mode: Mode, call: Call, out: Any) -> None:
    for f in mode.get(call["self"]):
        mode.labels.fixed(f.labels, {out.dim() - 1, out.dim() - 2}, INPUT)
    mode.put(out, [Field(f.labels) for f in mode.get(call["self"])])


# --- reductions and norms ------------------------------------------------------------------------


@rule("mean", "sum", "var", "std", "amax", "amin", "linalg_vector_norm", "norm", "prod", "max",
      "min", "var_mean", "logsumexp", "any", "all", "std_mean")  # fmt: skip
def _reduce(mode: Mode, call: Call, out: Any) -> bool | None:
    if isinstance(call.get("other"), Tensor):
        return elementwise(mode, call, out)
    x, dim, found = call["self"], call.get("dim"), results(out)
    dims = range(x.dim()) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
    over = {d % max(x.dim(), 1) for d in dims}
    fields = []
    for f in mode.get(x):
        mode.trace.averaged.append((f.labels, over))
        left = f.labels
        for d in sorted(over, reverse=True):
            left = left.narrow(d, 0, 1) if call.get("keepdim") else left.select(d, 0)
        fields.append(Field(left))
    for result in found:
        mode.put(result, fields)
    return None


@rule("native_layer_norm", "_fused_rms_norm")
def _layer_norm(mode: Mode, call: Call, out: Any) -> None:
    x = call["input"]
    over = set(range(x.dim() - len(call["normalized_shape"]), x.dim()))
    mode.trace.averaged += [(f.labels, over) for f in mode.get(x)]
    given = [x, *(call[k] for k in ("weight", "bias") if isinstance(call.get(k), Tensor))]
    mode.put(results(out)[0], met(mode, given, x.shape))


@rule("native_batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit",
      "_batch_norm_no_update", "_batch_norm_with_update", "cudnn_batch_norm")  # fmt: skip
def _batch_norm(mode: Mode, call: Call, out: Any) -> None:
    x, fields = call["input"], [f.labels for f in mode.get(call["input"])]
    for key in ("weight", "bias", "running_mean", "running_var"):
        for f in mode.get(call.get(key)):
            meets(mode, fields, along(f.labels, 1, x.shape))
    mode.put(out[0], [Field(f) for f in fields])


@rule("native_group_norm")
def _group_norm(mode: Mode, call: Call, out: Any) -> None:
    x, fields, groups = call["input"], [f.labels for f in mode.get(call["input"])], call["group"]
    for key in ("weight", "bias"):
        for f in mode.get(call.get(key)):
            meets(mode, fields, along(f.labels, 1, x.shape))
    for field in fields if groups < x.shape[1] else ():
        if 1 in mode.labels.named(field):
            mode.labels.grid(vector(field, 1).view(groups, -1))
            mode.trace.averaged.append((field, {1}))
    mode.put(out[0], [Field(f) for f in fields])


def meets(mode: Mode, fields: list[Tensor], own: Tensor) -> None:
    """A parameter's labels meet the fields of a tensor; with none of them it is fixed."""
    partners = [f for f in fields if mode.labels.named(f) & mode.labels.named(own)]
    for f in partners:
        mode.labels.same(f, own)
    if not partners:
        mode.labels.lock(own, INPUT)


# --- lookups, pooling, padding -------------------------------------------------------------------


@rule("embedding")
def _embedding(mode: Mode, call: Call, out: Any) -> None:
    fields = []
    for f in mode.get(call["weight"]):
        if 0 in mode.labels.named(f.labels):
            mode.labels.lock(f.labels, TABLE)
        else:
            columns = vector(f.labels, 1)
            mode.trace.made |= set(columns.tolist()) if f.own else set()
            fields.append(Field(along(columns, -1, out.shape)))
    mode.put(out, fields)


@rule("index")
def _index(mode: Mode, call: Call, out: Any) -> bool | None:
    indices = call["indices"]
    if any(mode.get(i) for i in indices):
        return False
    dims, dim = set(), 0
    for index in indices:
        wide = index.dim() if index is not None and index.dtype == torch.bool else 1
        dims |= set(range(dim, dim + wide)) if index is not None else set()
        dim += wide
    for f in mode.get(call["self"]):
        mode.labels.fixed(f.labels, dims, TABLE)
    mode.put(out, [Field(call.again(f.labels)) for f in mode.get(call["self"])])
    return None


def _pooled(spatial: int) -> Rule:
    def apply(mode: Mode, call: Call, out: Any) -> None:
        x, found = call.args[0], results(out)
        dims = set(range(x.dim() - spatial, x.dim()))
        fields = []
        for f in mode.get(x):
            mode.labels.fixed(f.labels, dims, "pooled as if channels were places")
            if not mode.labels.named(f.labels) & dims:
                fields.append(Field(spread(mode, f.labels, found[0].shape)))
        for result in found:
            mode.put(result, fields)

    return apply


for _n in (1, 2, 3):
    rule(f"avg_pool{_n}d", f"max_pool{_n}d", f"max_pool{_n}d_with_indices", f"reflection_pad{_n}d",
         f"_adaptive_avg_pool{_n}d", f"adaptive_avg_pool{_n}d", f"adaptive_max_pool{_n}d",
         f"replication_pad{_n}d", f"upsample_nearest{_n}d", f"_upsample_nearest_exact{_n}d",
         f"upsample_{('linear', 'bilinear', 'trilinear')[_n - 1]}{_n}d",
         *(("upsample_bicubic2d",) if _n == 2 else ()))(_pooled(_n))  # fmt: skip


@rule("constant_pad_nd")
def _padded(mode: Mode, call: Call, out: Any) -> None:
    pad, fields = call["pad"], []
    for f in mode.get(call["self"]):
        named = mode.labels.named(f.labels)
        small = f.labels[tuple(slice(None if d in named else 1) for d in range(out.dim()))]
        kept = [n if out.dim() - 1 - i // 2 in named else 0 for i, n in enumerate(pad)]
        padded = torch.constant_pad_nd(small, kept, 0)
        fields.append(Field(padded.expand(out.shape)))
    mode.put(out, fields)
