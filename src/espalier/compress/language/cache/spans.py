"""Attention spans head by head: the mask that a model gets, with or without a cache that drops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from espalier.compress.language.anatomy import Attention
from espalier.compress.language.cache.plan import Plan, Span
from espalier.errors import EspalierError

PLAN = "cache_plan"  # the attribute of an attention that holds its plan


def visible(
    spans: tuple[Span | None, ...], queries: Tensor, keys: Tensor, sinks: int = 1
) -> Tensor:
    """Which keys each query sees: `(groups, q, k)` of bool.

    `queries` are positions `(q,)`, `keys` positions `(groups, k)`, -1 for what is only filling.
    Never what comes later; always the first `sinks`; else from where the span begins.
    """
    rows = []
    for span, own in zip(spans, keys, strict=True):
        seen = (own[None] <= queries[:, None]) & (own >= 0)[None]
        if span is not None:
            near = own[None] >= span.first(queries)[:, None]
            seen &= near | (own < sinks)[None]
        rows.append(seen)
    return torch.stack(rows)


def hold(model: nn.Module, attention: Attention) -> None:
    """Makes an attention see no further than the spans of its plan, in place.

    A forward hook narrows its mask: with no cache, with a `DynamicCache` (nothing is saved), and
    with a `PlannedCache`, which then holds no more than the spans need. The weights and the
    attention kernel stay as they are ("sdpa" or "eager"; others take no mask a head).
    Errors: `EspalierError`.
    """
    config: Any = getattr(model, "config", None)
    kernel = getattr(config, "_attn_implementation", "eager")
    if kernel not in ("sdpa", "eager"):
        rule = "spans head by head need attention that takes a mask a head: 'sdpa' or 'eager'"
        raise EspalierError(f"{rule}, the model has {kernel!r}: set_attn_implementation('sdpa')")
    module = model.get_submodule(attention.path)
    if any(isinstance(hook, _Narrow) for hook in module._forward_pre_hooks.values()):
        return
    narrow = _Narrow(attention.heads // attention.groups)
    module.register_forward_pre_hook(narrow, with_kwargs=True)


def release(model: nn.Module) -> None:
    """Takes all plans and spans off a model again."""
    for module in model.modules():
        module.__dict__.pop(PLAN, None)
        hooks = module._forward_pre_hooks
        for key in [k for k, hook in hooks.items() if isinstance(hook, _Narrow)]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


class _Narrow:
    """The hook of one attention; each group has so many query heads."""

    def __init__(self, each: int) -> None:
        self.each = each

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        plan: Plan | None = getattr(module, PLAN, None)
        if plan is None or not any(plan.spans):
            return None
        states = args[0] if args else kwargs["hidden_states"]
        new, groups = states.shape[1], len(plan.spans)
        cache = kwargs.get("past_key_values")
        index: Any = getattr(module, "layer_idx", 0)
        seen, layer = 0, None
        if cache is not None and index < len(cache.layers):
            layer = cache.layers[index]
            seen = int(cache.get_seq_length(index))
        if hasattr(layer, "positions"):
            assert layer is not None
            layer.masked = True
            keys = layer.positions(new, groups)
        else:
            keys = torch.arange(seen + new).expand(groups, -1)
        queries = torch.arange(seen, seen + new)
        own = visible(plan.spans, queries, keys, plan.sinks)
        own = own.repeat_interleave(self.each, 0)[None].to(states.device)
        where = keys.repeat_interleave(self.each, 0).to(states.device)
        mask = _joined(kwargs.get("attention_mask"), own, where, states.dtype, module)
        return args, {**kwargs, "attention_mask": mask}


def _joined(
    mask: Tensor | None, own: Tensor, where: Tensor, dtype: torch.dtype, module: nn.Module
) -> Tensor:
    """The model's own mask `(b, 1, q, n)` at the keys that are there, and the spans' `(1, h, q, k)`."""
    config: Any = getattr(module, "config", None)
    eager = getattr(config, "_attn_implementation", "eager") == "eager"
    if mask is not None:
        index = where.clamp_min(0)  # (h, k) into the n columns
        mask = mask[:, :, :, : int(index.max()) + 1]
        mask = torch.stack([mask[:, 0][..., columns] for columns in index], 1)
        if mask.dtype == torch.bool:
            own = own & mask
            mask = None
    if not eager and mask is None:
        return own
    low = torch.finfo(dtype).min
    shown = torch.zeros((), dtype=dtype, device=own.device)
    hidden = torch.full((), low, dtype=dtype, device=own.device)
    added = torch.where(own, shown, hidden)
    return added if mask is None else torch.minimum(added, mask)
