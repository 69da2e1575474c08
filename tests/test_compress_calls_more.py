"""Blocks within blocks, and modules that are called in other ways than with one tensor for one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.compress import Bits, Depth, Pretrained, Widths
from espalier.compress.importance import scores
from espalier.compress.one_shot import sparsify
from espalier.compress.repair import reconstruct
from espalier.costs import Counts, count

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
VECTORS = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))


def offered(model: nn.Module, example: Tensor) -> list[str]:
    return [d.name for d in Depth().bind(model.eval(), example).decisions]


# --- blocks within blocks -----------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(F.relu(self.one(x)))


class ResidualGroup(nn.Module):
    """Blocks and a layer within a shortcut, as networks for super-resolution have."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def restoring() -> nn.Module:
    torch.manual_seed(0)
    first, last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
    group = ResidualGroup(Residual(8), Residual(8), nn.Conv2d(8, 8, 3, padding=1))
    return nn.Sequential(first, group, last).eval()


def test_blocks_within_a_block_are_decisions_where_that_is_kept():
    family = Pretrained(restoring(), IMAGES, (Depth(),))
    assert family.space.names == ("depth:1", "depth:1.body.0", "depth:1.body.1")
    assert family.ignored == ()
    for name in family.space.names[1:]:
        assert dict(family.space[name].when) == {"depth:1": (1,)}
    start, group, end = family.model
    small = family.build({**family.original, "depth:1.body.0": 0})
    x = start(IMAGES)
    assert torch.equal(small(IMAGES), end(x + group.body[2](group.body[1](x))))
    assert torch.equal(family.build({"depth:1": 0})(IMAGES), end(x))
    codes = family.space.sample(20, np.random.default_rng(0))
    table = Counts(family).estimate_codes(codes)
    for i, candidate in enumerate(family.space.decode(codes)):
        built = count(family.build(candidate), family.example())
        assert (table["params"][i], table["macs"][i]) == (built.params, built.macs)


class Layer(nn.Module):
    """A transformer's layer of attention and feed-forward part."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.feed = nn.Sequential(nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.feed(self.norm2(x))


class Placed(nn.Module):
    """An encoder that adds its positions before its layers."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.places = nn.Embedding(6, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.places(torch.arange(x.shape[1]).expand(len(x), -1))
        for layer in self.layers:
            x = layer(x)
        return x


def test_an_encoder_that_adds_its_positions_offers_its_layers():
    model = nn.Sequential(nn.Linear(8, 16), Placed(), nn.Linear(16, 5))
    parts = [f"depth:1.layers.{i}.{part}" for i in range(3) for part in ("attention", "feed")]
    assert offered(model, VECTORS) == ["depth:1", *parts]
    family = Pretrained(model, VECTORS, (Depth(),))
    small = family.build({**family.original, "depth:1.layers.2.feed": 0})
    expected = family.model
    for weight in expected[1].layers[2].feed[2].parameters():
        nn.init.zeros_(weight)
    assert torch.allclose(small(VECTORS), expected(VECTORS), atol=1e-6)


class ResponseNorm(nn.Module):
    """Adds to its input what it scales of it, as the norm of ConvNeXt V2 does."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + (x * x.norm(dim=1, keepdim=True) * self.scale + self.shift)


class Adapted(nn.Module):
    """A linear layer with one of few ranks beside it."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.base, self.down, self.up = nn.Linear(into, out), nn.Linear(into, 2), nn.Linear(2, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Mixed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.feed = nn.Sequential(
            Adapted(width, 24), nn.GELU(), ResponseNorm(24), Adapted(24, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.feed(x)


def test_layers_beside_layers_and_norms_within_a_block_are_no_decisions():
    group = ResidualGroup(Mixed(16), Mixed(16), nn.Linear(16, 16))
    model = nn.Sequential(nn.Linear(8, 16), group, nn.Linear(16, 5))
    assert offered(model, VECTORS) == ["depth:1", "depth:1.body.0", "depth:1.body.1"]


# --- what a block gives, and how a layer is called ----------------------------------------------


class Pair(nn.Module):
    """A block that gives a tuple."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return F.relu(x + self.conv(x)), None


class Named(Pair):
    """A block that gives a dictionary."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"features": super().forward(x)[0]}


class Chained(nn.Module):
    def __init__(self, block: type[Pair]) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(3, 8, 1), block(8), block(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for block in (self.one, self.two):
            found = block(x)
            x = found["features"] if isinstance(found, dict) else found[0]
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("block", [Pair, Named])
def test_blocks_that_give_more_than_a_tensor_have_layers_of_integers(block: type[Pair]):
    torch.manual_seed(0)
    family = Pretrained(Chained(block), IMAGES, (Bits(),), calibration=IMAGES)
    small = family.build(dict.fromkeys(family.original, 8))
    given, expected = small(IMAGES), family.model(IMAGES)
    assert (given - expected).norm() < 0.05 * expected.norm()


class Placewise(nn.Module):
    """Layers that are called by place."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
        self.out, self.head = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.two(F.relu(self.one(x)))).mean((2, 3))
        return self.head(F.relu(self.out(x)))


class Keyworded(Placewise):
    """The same layers, called by keyword."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.two(input=F.relu(self.one(input=x)))).mean((2, 3))
        return self.head(input=F.relu(self.out(input=x)))


def both() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain, keyworded = Placewise().eval(), Keyworded().eval()
    keyworded.load_state_dict(plain.state_dict())
    return plain, keyworded


def test_layers_called_by_keyword_are_repaired():
    images = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    found = []
    for model in both():
        family = Pretrained(model, IMAGES, (Widths(multiple=1),))
        small = family.build({**family.original, "width:one": 4, "width:out": 4})
        found.append(reconstruct(small, family.model, images))
    assert found[0] == found[1]
    assert [row["layer"] for row in found[1]["layers"]] == ["one", "two", "out", "head"]


def test_what_layers_called_by_keyword_read_is_seen():
    found = []
    for model in both():
        groups = Pretrained(model, IMAGES, (Widths(multiple=1),)).cuts[0].groups
        found.append(scores(model, groups, "activation", [(IMAGES, torch.zeros(2))]))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    plain, keyworded = both()
    assert sparsify(plain, IMAGES, "2:4") == sparsify(keyworded, IMAGES, "2:4")


class Keyed(nn.Module):
    """A block that is called by keyword and gives a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.feed = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> dict[str, Tensor | None]:
        return {"weights": None, "hidden": hidden + self.feed(hidden)}


class Keys(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.start, self.head = nn.Linear(8, 8), nn.Linear(8, 5)
        self.blocks = nn.ModuleList(Keyed() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        for block in self.blocks:
            x = block(mask=None, hidden=x)["hidden"]
        return self.head(x)


def test_blocks_called_by_keyword_that_give_dictionaries_are_left_out():
    torch.manual_seed(0)
    family = Pretrained(Keys(), VECTORS, (Depth(),))
    assert "depth:blocks.0" in family.space.names
    assert family.ignored == ()
    model, small = family.model, family.build({**family.original, "depth:blocks.0": 0})
    assert torch.equal(small(VECTORS), model.head(model.blocks[1](model.start(VECTORS))["hidden"]))


class Tuples(nn.Module):
    """A layer that calls its attention by keyword and takes a tuple, as Llama's does."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(8), Mix()
        self.feed = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.mix(hidden=self.norm(x), weights=False)
        x = x + y
        return x + self.feed(x)


class Mix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.values, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, hidden: Tensor, weights: bool) -> tuple[Tensor, None]:
        return self.out(self.values(hidden).cumsum(1)), None


def test_a_branch_called_by_keyword_adds_nothing():
    torch.manual_seed(0)
    family = Pretrained(nn.Sequential(nn.Linear(8, 8), Tuples()), VECTORS, (Depth(),))
    assert family.ignored == ()
    start, layer = family.model
    x = start(VECTORS)
    small = family.build({**family.original, "depth:1.mix": 0})
    assert torch.allclose(small(VECTORS), x + layer.feed(x), atol=1e-6)
