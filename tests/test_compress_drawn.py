"""Branches that a small scale hides from numbers are cut as rightly as others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from espalier.compress import Widths
from espalier.compress.coupling.drawn import seen
from espalier.compress.coupling.proof import close

TOKENS = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))


class Mixed(nn.Module):
    """A branch with its own name for the number of heads, behind a scale."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.stem, self.out = nn.Linear(16, 16), nn.Linear(16, 3)
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.gamma = nn.Parameter(torch.full((16,), scale))
        self.parts = 4

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.parts, -1).permute(2, 0, 3, 1, 4)
        y = ((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).reshape(b, n, -1)
        return self.out(x + self.gamma * self.proj(y)).mean(1)


@pytest.mark.parametrize("scale", [1e-6, 0.0])
def test_what_a_scale_hides_is_found_as_without_it(scale: float) -> None:
    found = []
    for value in (1.0, scale):
        torch.manual_seed(0)
        found.append(Widths(multiple=1).bind(Mixed(value), TOKENS))
    plain, hidden = found
    assert hidden.decisions == plain.decisions
    assert hidden.ignored == plain.ignored
    assert hidden.traced.keys() == plain.traced.keys()
    numbers = [{n: g.numbers for n, g in b.groups.items()} for b in found]
    assert numbers[0] == numbers[1]


@pytest.mark.parametrize("scale", [1e-6, 0.0])
def test_the_model_keeps_its_own_scales(scale: float) -> None:
    torch.manual_seed(0)
    model = Mixed(scale)
    Widths(multiple=1).bind(model, TOKENS)
    assert torch.equal(model.gamma, torch.full((16,), scale))
    twin = seen(model)
    assert twin.qkv.weight is model.qkv.weight
    assert twin.gamma.std() > 0.1
    assert not close(twin(TOKENS), model(TOKENS))


def test_trained_scales_and_biases_stay() -> None:
    model = Mixed(1.0)
    nn.init.uniform_(model.gamma, 0.5, 1)
    nn.init.zeros_(model.qkv.bias)
    assert seen(model) is model
