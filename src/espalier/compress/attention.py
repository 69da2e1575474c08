"""torch's attention with any number of heads: what a cut `nn.MultiheadAttention` becomes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.errors import EspalierError


class Attention(nn.Module):
    """`nn.MultiheadAttention` whose heads need not fill the width of its inputs.

    Parameters have the same names, so weights move over as they are; `forward` takes and gives the
    same. Not here: `add_bias_kv`, `add_zero_attn`.
    """

    def __init__(self, original: nn.MultiheadAttention) -> None:
        super().__init__()
        if original.bias_k is not None or original.add_zero_attn:
            raise EspalierError("attention with add_bias_kv or add_zero_attn is left alone")
        self.out_proj: nn.Linear
        self.in_proj_weight: Tensor | None
        self.in_proj_bias: Tensor | None
        self.q_proj_weight: Tensor
        self.k_proj_weight: Tensor
        self.v_proj_weight: Tensor
        self.num_heads, self.head_dim = original.num_heads, original.head_dim
        self.dropout, self.batch_first = original.dropout, original.batch_first
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            self.register_parameter(name, getattr(original, name))
        self.in_proj_bias = original.in_proj_bias
        self.out_proj = original.out_proj
        self._qkv_same_embed_dim = False  # keeps torch's encoder layers on their plain path
        self.train(original.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Outputs and, where wanted, the attention `(b, n, m)`, as `nn.MultiheadAttention` does."""
        batched = query.dim() == 3
        if not batched:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        q, k, v = self._projected(query, key, value)
        mask = self._mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / self.head_dim**0.5
            weights = F.softmax(scores if mask is None else scores + mask, -1)
            out = F.dropout(weights, dropout) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return out.squeeze(0), weights if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _projected(self, *inputs: Tensor) -> list[Tensor]:
        """Queries, keys, values `(b, heads, n, head_dim)`."""
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        found = []
        for x, w, b in zip(inputs, weights, biases, strict=True):
            y = F.linear(x, w, b)
            found.append(y.view(*y.shape[:2], self.num_heads, self.head_dim).transpose(1, 2))
        return found

    def _mask(self, mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
        """One mask to be added, `(b or 1, heads or 1, n, m)`."""
        if mask is not None:
            mask = _added(mask, q)
            mask = mask.view(-1, self.num_heads, *mask.shape[1:]) if mask.dim() == 3 else mask
        if padding is None:
            return mask
        padding = _added(padding if padding.dim() == 2 else padding.unsqueeze(0), q)
        padding = padding[:, None, None, :]
        return padding if mask is None else mask + padding


def _added(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))
