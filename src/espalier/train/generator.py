"""A network that writes architectures: given a target, one option of every decision.

An LSTM (Hochreiter & Schmidhuber, 1997) goes through the decisions in the order of the space and
sees at each the target and what it chose before, so that it can make up for it. Choices are drawn
with Gumbel noise and are one-hot forward; their gradient is that of the softmax (Jang, Gu & Poole,
Categorical Reparameterization with Gumbel-Softmax, 2017), so that a loss of the network that runs
the choices reaches the generator. As in ShiftNAS (Zhang et al., ShiftNAS: Improving One-shot NAS
via Probability Shift, 2023, https://arxiv.org/abs/2307.08300).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from espalier.errors import SpaceError
from espalier.space import Candidate, Real, Space
from espalier.train.onehot import candidates

# Weights of one-hot choices `(n, options)` by decision to prices `(n,)`; differentiable.
Price = Callable[[Mapping[str, Tensor]], Tensor]


class Generator(nn.Module):
    """Targets `(n,)`, about 0 to 1, to one-hot choices `{decision: (n, options)}`.

    Errors: `SpaceError` for a space with a real decision, which has no options to choose from.
    """

    def __init__(self, space: Space, hidden: int = 48) -> None:
        super().__init__()
        real = [d.name for d in space.decisions if isinstance(d, Real)]
        if real:
            raise SpaceError(
                f"a generator chooses among options, decision {real[0]!r} is real: make it ordinal"
            )
        self.space = space
        counts = [d.count for d in space.decisions]
        self.target = nn.Sequential(nn.Linear(1, hidden), nn.Tanh(), nn.Linear(hidden, hidden))
        self.place = nn.Embedding(len(counts), hidden)
        self.cell = nn.LSTMCell(hidden, hidden)
        self.chosen = nn.ModuleList(nn.Linear(n, hidden, bias=False) for n in counts)
        self.head = nn.ModuleList(nn.Linear(hidden, n) for n in counts)

    def forward(
        self, targets: Tensor, noise: torch.Generator | None = None, temperature: float = 1.0
    ) -> dict[str, Tensor]:
        """Choices for each target: the likeliest, or drawn with Gumbel noise from `noise`."""
        return self.draw(targets, noise, temperature)[0]

    def draw(
        self, targets: Tensor, noise: torch.Generator | None = None, temperature: float = 1.0
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Choices, and how open they were: the mean entropy over decisions, from 0 to 1."""
        wanted = self.target(2 * targets[:, None] - 1)
        hidden = state = torch.zeros_like(wanted)
        told, open_ = wanted, wanted.new_zeros(())
        out: dict[str, Tensor] = {}
        places = self.place.weight
        for i, name in enumerate(self.space.names):
            hidden, state = self.cell(told + places[i], (hidden, state))
            logits = self.head[i](hidden)
            open_ = open_ + openness(logits)
            if noise is not None:
                logits = logits + gumbel(logits, noise)
            picked = straight(torch.softmax(logits / temperature, dim=1))
            out[name] = picked
            told = wanted + self.chosen[i](picked)
        return out, open_ / len(out)

    @torch.no_grad()
    def write(
        self, target: float, price: Price | None = None, tries: int = 1, seed: int = 0
    ) -> Candidate:
        """A candidate for one target: the likeliest or, of several tries, the nearest in price.

        `price` gives prices in the units of the target; without it there is one try.
        """
        choices = self(torch.tensor([target], dtype=torch.float32))
        if price is not None and tries > 1:
            drawn = self(
                torch.full((tries - 1,), float(target)), torch.Generator().manual_seed(seed)
            )
            choices = {k: torch.cat([choices[k], drawn[k]]) for k in choices}
            best = int((price(choices) - target).abs().argmin())
            choices = {k: v[best : best + 1] for k, v in choices.items()}
        return candidates(self.space, choices)[0]


def straight(soft: Tensor) -> Tensor:
    """Exactly one-hot at the largest of each row; the gradient is that of `soft`."""
    hard = functional.one_hot(soft.argmax(dim=1), soft.shape[1]).to(soft.dtype)
    out: Tensor = _Straight.apply(hard, soft)  # type: ignore[no-untyped-call]
    return out


class _Straight(torch.autograd.Function):
    """Forward the first, backward to the second; a sum of both would not be exactly 0 and 1."""

    @staticmethod
    def forward(ctx: Any, hard: Tensor, soft: Tensor) -> Tensor:
        return hard.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0]


def openness(logits: Tensor) -> Tensor:
    """The entropy of each row's softmax as a share of the most it can be; the mean over rows."""
    if logits.shape[1] == 1:
        return logits.new_ones(())
    logs = torch.log_softmax(logits, dim=1)
    return -(logs.exp() * logs).sum(1).mean() / math.log(logits.shape[1])


def gumbel(like: Tensor, noise: torch.Generator) -> Tensor:
    """Standard Gumbel noise of the shape and on the device of `like`."""
    exponential = torch.empty(like.shape, dtype=like.dtype).exponential_(generator=noise)
    return -exponential.clamp_min(1e-20).log().to(like.device)
