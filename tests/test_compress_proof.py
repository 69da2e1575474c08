"""The proof of a cut shows what is cut wrongly, whatever the example and the model's precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.compress import Pretrained, Widths
from espalier.compress.coupling.proof import close
from espalier.compress.coupling.trial import trial_of
from espalier.costs import Counts, count

IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))


class Spatial(nn.Module):
    """Attention over the places of images, scaled by its width, as in diffusion's autoencoders."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).flatten(2).transpose(1, 2)[:, None] for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)
        return x + self.out(y.reshape(len(x), -1, *x.shape[2:]))


def spatial() -> nn.Sequential:
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 16, 1), nn.ReLU(), Spatial(16), nn.ReLU(), nn.Conv2d(16, 16, 3, 2)]
    head = [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)]
    return nn.Sequential(*body, *head).eval()


@pytest.mark.parametrize(
    "example",
    [torch.zeros_like(IMAGES), torch.ones_like(IMAGES), torch.zeros(1, 3, 6, 6), IMAGES.half(),
     IMAGES.bfloat16()],
)  # fmt: skip
def test_no_example_hides_that_a_cut_changes_the_scale_of_attention(example: Tensor) -> None:
    bound = Widths(multiple=1).bind(spatial().to(example.dtype), example)
    assert "2.q" not in bound.groups
    assert "2.v" in bound.groups
    assert "2.q" in {i.layer for i in bound.ignored}


class Demanding(nn.Module):
    """Its inputs are whole numbers in floats, as one list of indices."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.a, self.b = nn.Embedding(4, 8), nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.equal(x, x.round()):
            raise ValueError("indices are whole")
        return self.b(F.relu(self.a(self.table(x.long()))))


class Fixed(nn.Module):
    """It makes a tensor of a type that a copy in float64 can't take."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x.to(torch.float32))))


@pytest.mark.parametrize(
    ("model", "example"),
    [(Demanding(), torch.tensor([[0.0, 3.0], [1.0, 2.0]])), (Fixed(), torch.randn(2, 8))],
)
def test_a_model_that_takes_no_noise_or_no_float64_is_cut(
    model: nn.Module, example: Tensor
) -> None:
    assert "a" in Widths(multiple=1).bind(model.eval(), example).groups
    assert trial_of(model, example).inputs[0].dtype == (
        torch.float32 if isinstance(model, Fixed) else torch.float64
    )


def test_logarithms_of_what_is_never_negative_are_tried_on_noise() -> None:
    class Logarithms(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.log())

    example = torch.rand(2, 8) + 0.1
    given = trial_of(Logarithms(8, 3), example).inputs[0]
    assert given.shape == example.shape
    assert not torch.equal(given, example.double())
    assert given.min() >= example.min()


def test_a_norm_in_float32_is_judged_by_the_rounding_of_float32() -> None:
    class Norm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.layer_norm(x.float(), (x.shape[-1],)).to(x.dtype)

    model = nn.Sequential(nn.Linear(8, 8), Norm(), nn.Linear(8, 3))
    assert trial_of(model, torch.randn(2, 8)).eps == torch.finfo(torch.float32).eps
    assert trial_of(model[2], torch.randn(2, 8)).eps == 0


def test_shared_tensors_are_shared_in_the_copy_that_is_tried() -> None:
    a, b = nn.Linear(8, 8), nn.Linear(8, 8)
    b.weight = a.weight
    model = nn.Sequential(a, nn.ReLU(), b)
    tried = trial_of(model, torch.randn(2, 8)).model
    assert tried[0].weight is tried[2].weight
    assert tried[0].weight.dtype == torch.float64
    assert a.weight.dtype == torch.float32


def test_what_is_infinite_hides_no_difference() -> None:
    a = torch.tensor([1.0, float("-inf"), float("inf")])
    assert close(a, a)
    assert not close(a, torch.tensor([2.0, float("-inf"), float("inf")]))


class Attending(nn.Module):
    """Attention that gives its weights, too; its width must be that of its input."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        b, n, c = x.shape
        parts = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / 2).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, c)), weights


class Weighted(nn.Module):
    """The mean over heads of the attention's weights scales its output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.out = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 5)
        self.attend = Attending()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y, weights = self.attend(self.norm(x))
        return self.out(x + y) * weights.mean()


def test_means_over_heads_and_channels_hide_no_shape_that_fits_by_chance() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, 8)
    family = Pretrained(Weighted(), x, (Widths(multiple=1),))
    assert len(family.space.decisions) == 2
    rows = family.space.sample(12, np.random.default_rng(0))
    costs = Counts(family).estimate_codes(rows)
    for i, candidate in enumerate(family.space.decode(rows)):
        network = family.build(candidate)
        assert network(torch.randn(3, 9, 8)).shape == (3, 9, 5)
        assert costs["macs"][i] == count(network, family.example()).macs


class Tempered(nn.Module):
    """A scale from the width of the stream that is nothing where few channels are left."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.shape[-1] // 4) ** -0.5


def test_groups_that_cannot_be_cut_to_the_least_are_left_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), Tempered(), nn.Linear(16, 12))
    bound = Widths(multiple=1).bind(nn.Sequential(*model, nn.ReLU(), nn.Linear(12, 3)), TOKENS)
    assert list(bound.groups) == ["3"]
    assert [i.layer for i in bound.ignored if "negative power" in i.reason] == ["0"]


def test_groups_that_shorten_the_output_are_left_alone() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm, self.out = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.stem(x))
            return self.out(x[:, : x.shape[-1] // 3])

    bound = Widths(multiple=1).bind(Block(), TOKENS)
    assert not bound.groups
