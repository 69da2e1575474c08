"""Caches that keep some tokens and drop the others: what decisions on a cache are compared with."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from espalier.errors import EspalierError, unknown

By = Literal["recent", "norm", "attention"]
BYS = ("recent", "norm", "attention")


class _Kept(DynamicLayer):  # type: ignore[misc]
    """A layer that holds at most `tokens` of those it saw, each head its own."""

    is_croppable = False

    def __init__(self, tokens: int, recent: int, sinks: int, by: By, half: bool) -> None:
        super().__init__()
        self.tokens, self.near, self.sinks, self.by, self.half = tokens, recent, sinks, by, half
        self.seen = 0
        self.scores: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        new = [x.half() if self.half else x for x in (key_states, value_states)]
        self.keys = torch.cat([self.keys.to(new[0].dtype), new[0]], 2)
        self.values = torch.cat([self.values.to(new[1].dtype), new[1]], 2)
        self.seen += key_states.shape[2]
        keys, values = self.keys.to(self.dtype), self.values.to(self.dtype)
        if self.by != "attention":
            self._evict(-keys.norm(dim=-1) if self.by == "norm" else None)
        return keys, values

    def observe(self, attention: Tensor) -> None:
        """Adds what queries gave each key `(b, heads, q, k)`, then drops who got least."""
        groups = self.keys.shape[1]
        given = attention.reshape(attention.shape[0], groups, -1, attention.shape[-1]).sum(2)
        if self.scores is not None:
            given[..., : self.scores.shape[-1]] += self.scores
        self.scores = given
        self._evict(given)

    def _evict(self, scores: Tensor | None) -> None:
        count = self.keys.shape[2]
        if count <= self.tokens:
            return
        order = torch.arange(count, dtype=torch.float32).expand(self.keys.shape[:3]).clone()
        if scores is not None:
            order = scores.clone()
            order[..., count - self.near :] = torch.inf  # recent ones have had no time
        order[..., : self.sinks] = torch.inf
        kept = order.topk(self.tokens, -1).indices.sort(-1).values
        where = kept[..., None].expand(-1, -1, -1, self.keys.shape[3])
        self.keys, self.values = self.keys.gather(2, where), self.values.gather(2, where)
        if self.scores is not None:
            self.scores = self.scores.gather(2, kept)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        held = 0 if not self.is_initialized else self.keys.shape[2]
        return held + query_length, self.seen - held

    def get_seq_length(self) -> int:
        return self.seen


class Evicting(Cache):  # type: ignore[misc]
    """A cache of at most `tokens` tokens a layer and head, the first `sinks` among them.

    - "recent": the last ones stay (StreamingLLM; Xiao et al., 2024);
    - "norm": those whose keys are short stay (Devoto et al., 2024);
    - "attention": half are the last ones, half those that got most attention (H2O; Zhang et al.,
      2023): `observe(attentions)` is to be called after every pass, which runs with "eager" attention.

    `half`: numbers are kept in 16 bits. Errors: `EspalierError`.
    """

    def __init__(
        self, layers: int, tokens: int, by: By = "recent", sinks: int = 1, half: bool = False
    ) -> None:
        if by not in BYS:
            raise EspalierError(unknown("rule of eviction", by, BYS))
        if tokens <= sinks:
            raise EspalierError(f"a cache of {tokens} tokens has no room beside {sinks} sinks")
        near = 0 if by == "recent" else tokens // 2 if by == "attention" else tokens // 4
        super().__init__(layers=[_Kept(tokens, near, sinks, by, half) for _ in range(layers)])
        self.wants_attention = by == "attention"

    @property
    def peak(self) -> int:
        """Bytes held after a pass; they do not fall."""
        return sum(t.untyped_storage().nbytes() for la in self.layers for t in (la.keys, la.values))

    def observe(self, attentions: Any) -> None:
        """What every layer's queries looked at in the last pass."""
        for layer, attention in zip(self.layers, attentions, strict=True):
            layer.observe(attention)
