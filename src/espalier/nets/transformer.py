"""The pre-norm transformer block that the small families of transformers share.

Vaswani et al., 2017; norms first (Xiong et al., 2020). Written so that torch.fx traces it into
torch's own layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class Block(nn.Module):
    """Attention and a feed-forward layer, each beside a shortcut: `(b, tokens, width)` to alike."""

    def __init__(self, width: int, heads: int, hidden: int, tokens: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.tokens, self.width, self.causal = heads, tokens, width, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.act, self.down = nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        query, key, value = (
            layer(y).reshape(-1, self.tokens, self.heads, self.width // self.heads).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).reshape(-1, self.tokens, self.width))
        out: Tensor = x + self.down(self.act(self.up(self.norm2(x))))
        return out


class Body(nn.Module):
    """Blocks one after the other, a position added before them and a norm after."""

    def __init__(
        self, depth: int, width: int, heads: int, hidden: int, tokens: int, causal: bool
    ) -> None:
        super().__init__()
        self.position = nn.Embedding(tokens, width)
        self.blocks = nn.Sequential(
            *(Block(width, heads, hidden, tokens, causal) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.position.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.blocks(x + self.position.weight))
        return out


def whole_heads(width: int, heads: int) -> int:
    """The largest number of heads, at most `heads`, that divides the width."""
    return next(h for h in range(heads, 0, -1) if width % h == 0)


def initialise(module: nn.Module, std: float = 0.02) -> None:
    """Weights of linear layers and embeddings normal with `std`, biases zero (Radford et al., 2019)."""
    for inner in module.modules():
        if isinstance(inner, (nn.Linear, nn.Embedding)):
            nn.init.normal_(inner.weight, std=std)
        if isinstance(inner, nn.Linear):
            torch.nn.init.zeros_(inner.bias)
