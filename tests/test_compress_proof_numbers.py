"""Numbers that modules keep follow a cut where they are sizes, not where they are as large by
chance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.compress import Pretrained, Widths

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(0, 20, (2, 6), generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))


class Sized(nn.Module):
    """Images must be of its size, which is as large as its width."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.image_size, self.embed_dim = 16, width
        self.conv, self.out = nn.Conv2d(3, width, 8, 8), nn.Linear(width, 5)
        self.position = nn.Parameter(torch.randn(1, 4, width))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.image_size:
            raise ValueError("wrong image size")
        x = self.conv(x).flatten(2).transpose(1, 2) + self.position
        return self.out(F.relu(x.reshape(len(x), -1, self.conv.out_channels)).mean(1))


class Written(nn.Module):
    """Its longest text is as long as its width."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.block_size = width
        self.table, self.places = nn.Embedding(20, width), nn.Embedding(16, width)
        self.scale = nn.Parameter(torch.rand(width) + 0.5)
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, 20)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens[:, -self.block_size :]
        x = self.table(tokens) + self.places(torch.arange(tokens.shape[1]))
        return self.out(self.norm(x) * self.scale)


class Listed(nn.Module):
    """As many scales as channels, in a list that keeps its length."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, width), nn.Linear(width, 3)
        self.scales = nn.ParameterList(nn.Parameter(torch.rand(width) + 0.5) for _ in range(width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        for scale in self.scales:
            x = F.relu(x * scale)
        return self.b(x)


@torch.no_grad()
def test_an_image_size_as_large_as_the_width_stays() -> None:
    family = Pretrained(Sized().eval(), IMAGES, (Widths(multiple=1),))
    network = family.build({**family.original, "width:conv": 6})
    assert network.image_size == 16
    assert network(IMAGES).shape == (2, 5)


@torch.no_grad()
def test_texts_as_long_as_the_width_are_not_shortened() -> None:
    family = Pretrained(Written().eval(), TOKENS, (Widths(multiple=1),))
    network = family.build({**family.original, "width:table": 8})
    assert network.table.embedding_dim == 8
    assert network(torch.randint(0, 20, (2, 14))).shape == (2, 14, 20)


def test_a_list_of_parameters_keeps_its_length() -> None:
    family = Pretrained(Listed().eval(), ROWS, (Widths(multiple=1),))
    network = family.build({**family.original, "width:a": 4})
    assert len(network.scales) == 8
    assert network(ROWS).shape == (2, 3)


class Rooted(nn.Module):
    """A norm by hand: `d` is the divisor of its mean."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.d, self.gain = d, nn.Parameter(torch.rand(d) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().sum(-1, keepdim=True) / self.d + 1e-6).rsqrt() * self.gain


class Viewed(nn.Module):
    """A scale that is viewed in its size; `longest` is as large by chance, and must stay."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.d, self.longest, self.gain = d, d, nn.Parameter(torch.rand(d) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        if self.longest < 15:
            raise ValueError("too long")
        return F.relu(x * self.gain.view(1, self.d))


@pytest.mark.parametrize("width", [16, 15])
@pytest.mark.parametrize("kind", [Rooted, Viewed])
@torch.no_grad()
def test_sizes_that_a_module_computes_with_follow(kind: type[nn.Module], width: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, width), kind(width), nn.Linear(width, 3)).eval()
    family = Pretrained(model, ROWS, (Widths(multiple=1, steps=99),))
    network = family.build({**family.original, "width:0": 6})
    assert network[1].d == 6
    assert network(ROWS).shape == (2, 3)


class Linear(nn.Module):
    """A linear layer by hand, with torch's names."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.weight = nn.Parameter(torch.randn(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def test_numbers_of_torchs_names_follow_without_need() -> None:
    model = nn.Sequential(Linear(8, 16), nn.ReLU(), Linear(16, 3)).eval()
    family = Pretrained(model, ROWS, (Widths(multiple=1, steps=99),))
    network = family.build({**family.original, "width:0": 6})
    assert (network[0].in_features, network[0].out_features) == (8, 6)
    assert (network[2].in_features, network[2].out_features) == (6, 3)
