"""A decoder of the Llama form, plain torch: what small trained weights are read into.

Touvron et al., Llama 2, 2023 (https://arxiv.org/abs/2307.09288): root-mean-square norms first,
rotary positions (Su et al., 2021) over neighbouring pairs of a head's channels, keys and values
shared by groups of heads (Ainslie et al., 2023), a gated feed-forward layer (Shazeer, 2020).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu


@dataclass(frozen=True)
class Sizes:
    """What a Llama is made of."""

    vocabulary: int
    width: int
    hidden: int
    depth: int
    heads: int
    groups: int  # heads of keys and values
    context: int
    theta: float = 10000.0
    eps: float = 1e-5


class Llama(nn.Module):
    """Tokens `(b, t)`, t up to the context, to the logits of the next one `(b, t, vocabulary)`.

    The output layer is the embedding's transpose.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.embed = nn.Embedding(sizes.vocabulary, sizes.width)
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.depth))
        self.norm = nn.RMSNorm(sizes.width, eps=sizes.eps)
        self.register_buffer("turn", _turns(sizes), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        turn = self.turn[: tokens.shape[1]]  # type: ignore[index]  # a buffer
        for block in self.blocks:
            x = block(x, turn)
        out: Tensor = self.norm(x) @ self.embed.weight.T
        return out


class Block(nn.Module):
    """Attention and a gated feed-forward layer, each beside a shortcut."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width, head = sizes.width, sizes.width // sizes.heads
        self.head, self.repeat = head, sizes.heads // sizes.groups
        self.norm1, self.norm2 = (nn.RMSNorm(width, eps=sizes.eps) for _ in range(2))
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, sizes.groups * head, bias=False)
        self.value = nn.Linear(width, sizes.groups * head, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, sizes.hidden, bias=False)
        self.up = nn.Linear(width, sizes.hidden, bias=False)
        self.down = nn.Linear(sizes.hidden, width, bias=False)

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        y = self.norm1(x)
        query, key, value = (
            layer(y).reshape(batch, tokens, -1, self.head).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        query, key = rotate(query, turn), rotate(key, turn)
        key, value = (t.repeat_interleave(self.repeat, dim=1) for t in (key, value))
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        y = self.norm2(x)
        out: Tensor = x + self.down(silu(self.gate(y)) * self.up(y))
        return out


def _turns(sizes: Sizes) -> Tensor:
    """Cosine and sine for each place and pair of channels: `(context, head / 2, 2)`."""
    head = sizes.width // sizes.heads
    speed = sizes.theta ** -(torch.arange(0, head, 2, dtype=torch.float64) / head)
    angle = torch.arange(sizes.context, dtype=torch.float64)[:, None] * speed
    return torch.stack([angle.cos(), angle.sin()], dim=-1).float()


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Turns pairs of neighbouring channels of `(b, heads, t, head)` by their place's angles."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = turn[..., 0], turn[..., 1]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
