"""What a cache's rounding and an attention's span cost, to first order, from one backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from espalier.compress.language.cache.bits import Rounded
from espalier.compress.language.cache.plan import OWN, Plan
from espalier.errors import EspalierError


@dataclass
class Taken:
    """Keys and values of one layer `(b, groups, t, head)`, as the cache gets them, and the
    gradients of the loss with respect to them."""

    keys: Tensor
    values: Tensor
    key_slopes: Tensor
    value_slopes: Tensor


def cache_slopes(model: Any, windows: Tensor, stride: int = 1) -> list[Taken]:
    """Every layer's keys and values on windows `(n, t)` of tokens and their gradients.

    `stride`: tokens stand at positions 0, stride, 2 * stride, ...: short text then shows what
    rotary positions do at `stride` times its length (positional interpolation of PM-KVQ).
    """
    from transformers import DynamicCache

    class Tap(DynamicCache):  # type: ignore[misc]
        def update(self, keys: Tensor, values: Tensor, index: int, *args: Any, **kw: Any) -> Any:
            kept.append((keys, values))
            return super().update(keys, values, index, *args, **kw)

    kept: list[tuple[Tensor, Tensor]] = []
    where = (torch.arange(windows.shape[1]) * stride)[None].expand(len(windows), -1)
    with torch.enable_grad():
        embedded = model.get_input_embeddings()(windows).detach().requires_grad_()
        out = model(
            inputs_embeds=embedded, position_ids=where, past_key_values=Tap(), use_cache=True
        )
        loss = _mean_loss(out.logits, windows)
        flat = [x for pair in kept for x in pair]
        slopes = torch.autograd.grad(loss, flat)
    return [
        Taken(keys.detach(), values.detach(), slopes[2 * i], slopes[2 * i + 1])
        for i, (keys, values) in enumerate(kept)
    ]


def _mean_loss(logits: Tensor, ids: Tensor) -> Tensor:
    return cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


def bits_harm(taken: Taken, bits: int, plan: Plan) -> float:
    """Mean |change by rounding * gradient| of a layer's keys, plus that of its values (Liu et al.,
    PM-KVQ, 2025). Groups of rounding as the plan has them; tokens that fill no block stay out."""
    if bits >= OWN:
        return 0.0
    total = 0.0
    parts = ((taken.keys, taken.key_slopes, plan.block), (taken.values, taken.value_slopes, 0))
    for rows, slopes, block in parts:
        count = rows.shape[2] // plan.block * plan.block
        own = rows[:, :, :count]
        moved = Rounded.of(own, bits, block).read(torch.float32) - own
        total += float((moved * slopes[:, :, :count]).abs().mean())
    return total


# --- spans ---------------------------------------------------------------------------------------


def influence(
    model: Any, windows: Tensor, marked: Tensor | None = None, own: bool = True, batch: int = 8
) -> Tensor:
    """What leaving out each entry of attention would add to the loss: `(layers, groups, t, t)`.

    With A the attention and G the loss's gradient by it, leaving out (i, j) adds to first order
    A_ij / (1 - A_ij) * (sum_n G_in A_in - G_ij), the others of the row growing to 1 again (MoA; Fu
    et al., 2024). Of the windows `(n, t)` the tokens `marked` count (all by default); with `own`
    they are the model's own answers. Sums over a group's query heads and means over windows.
    Errors: `EspalierError` where no token is marked.
    """
    total: Tensor | None = None
    marks = torch.ones_like(windows, dtype=torch.bool) if marked is None else marked
    with _eager(model):
        for at in range(0, len(windows), batch):
            ids, mask = windows[at : at + batch], marks[at : at + batch]
            part = _influence(model, ids, mask, own) * (len(ids) / len(windows))
            total = part if total is None else total + part
    if total is None:
        raise EspalierError("influence is measured on windows, got none")
    return total


def _influence(model: Any, ids: Tensor, mask: Tensor, own: bool) -> Tensor:
    with torch.enable_grad():
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        out = model(inputs_embeds=embedded, use_cache=False, output_attentions=True)
        logits = out.logits[:, :-1].float()
        labels = logits.argmax(-1) if own else ids[:, 1:]
        losses = cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        if not bool(mask[:, 1:].any()):
            raise EspalierError("no token is marked: influence is on the loss of marked tokens")
        loss = losses[mask[:, 1:]].mean() * len(ids)
        slopes = torch.autograd.grad(loss, out.attentions)
    found = []
    for attention, slope in zip(out.attentions, slopes, strict=True):
        a = attention.detach().float()
        mean = (slope * a).sum(-1, keepdim=True)
        gone = a / (1 - a).clamp_min(1e-6) * (mean - slope)
        found.append(gone.mean(0))
    layers = torch.stack(found)
    groups = int(getattr(model.config, "num_key_value_heads", layers.shape[1]))
    return layers.reshape(len(layers), groups, -1, *layers.shape[2:]).sum(2)


@contextmanager
def _eager(model: Any) -> Any:
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def span_harm(
    influences: Tensor, rules: Sequence[Callable[[Tensor], Tensor]], sinks: int
) -> Tensor:
    """The sum of influences that each rule leaves out: `(layers, groups, rules)`.

    A rule gives the first position that queries at some positions see; the first `sinks` stay.
    """
    size = influences.shape[-1]
    where = torch.arange(size)
    out = []
    for first in rules:
        hidden = (where[None] < first(where)[:, None]) & (where[None] >= sinks)
        out.append((influences * hidden).sum((-1, -2)))
    return torch.stack(out, -1)
