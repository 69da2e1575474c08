"""Widths: groups of coupled channels, and cut models against the original without those channels."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.compress.groups import Group
from espalier.compress.labelling import outputs
from espalier.compress.widths import BoundWidths, Widths


class Basic(nn.Module):
    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(i, o, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(o)
        self.conv2 = nn.Conv2d(o, o, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(o)
        self.short: nn.Module = nn.Identity() if i == o else nn.Conv2d(i, o, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.short(x))


def resnet() -> nn.Module:
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), Basic(8, 8, 1), Basic(8, 16, 2), *head)


class Inverted(nn.Module):
    """Depthwise, squeeze and excitation, PReLU; flattened before the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.prelu = nn.PReLU(8)
        self.expand = nn.Conv2d(8, 32, 1)
        self.depthwise = nn.Conv2d(32, 64, 3, 1, 1, groups=32)
        self.norm = nn.BatchNorm2d(64)
        self.squeeze = nn.Conv2d(64, 4, 1)
        self.excite = nn.Conv2d(4, 64, 1)
        self.project = nn.Conv2d(64, 8, 1)
        self.head = nn.Linear(8 * 4 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.prelu(self.stem(x))
        y = F.hardswish(self.norm(self.depthwise(F.relu6(self.expand(x)))))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        return self.head((x + self.project(y * gate)).flatten(1))


class Dense(nn.Module):
    """Concatenation, nearest upsampling, transposed convolution, a cut in half and a product."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.conv = nn.Conv2d(8, 12, 3, 1, 1)
        self.norm = nn.BatchNorm2d(20)
        self.gated = nn.Conv2d(20, 16, 1)
        self.up = nn.ConvTranspose2d(8, 12, 2, 2)
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.gelu(self.norm(torch.cat([x, self.conv(F.relu(x))], 1)))
        a, b = self.gated(x).chunk(2, 1)
        x = F.interpolate(a * torch.sigmoid(b), scale_factor=2)
        return self.head(self.up(x).amax((2, 3)))


class Shuffled(nn.Module):
    """Grouped convolution, half of the channels passed by, shuffled channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 1, 1)
        self.branch = nn.Conv2d(8, 8, 1)
        self.grouped = nn.Conv2d(16, 24, 3, 1, 1, groups=4)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.stem(x).chunk(2, 1)
        x = torch.cat([a, F.silu(self.branch(b))], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(F.relu(self.grouped(x)).mean((2, 3)))


def seeded(make: type[nn.Module], *args: object) -> nn.Module:
    torch.manual_seed(0)
    model = make(*args)
    for m in model.modules():  # norms that do something
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
    return model.eval()


def silenced(
    model: nn.Module, groups: Mapping[str, Group], kept: Mapping[str, Tensor]
) -> nn.Module:
    """The original with zeros where weights read channels that go: what cut models must equal."""
    network = copy.deepcopy(model)
    tensors = dict(network.named_parameters())
    for name, units in kept.items():
        gone = [u for u in range(groups[name].units) if u not in units.tolist()]
        assert any(m.consumed for m in groups[name].members)
        for m in groups[name].members:
            if m.consumed:
                rows = m.rows[gone].flatten()
                tensors[f"{m.path}.{m.tensor}".strip(".")].data.index_fill_(m.dim, rows, 0)
    return network


def check(model: nn.Module, x: Tensor, **settings: object) -> BoundWidths:
    """Random widths of all groups with an exact reference: cut, and silenced, compute the same."""
    bound = Widths(**settings).bind(model, x)  # type: ignore[arg-type]
    rng = torch.Generator().manual_seed(1)
    for _ in range(3):
        choices = {
            d.name: d.options[int(torch.randint(d.count, (), generator=rng))]
            for d in bound.decisions
            if not bound.groups[d.name.removeprefix("width:")].averaged
        }
        small = copy.deepcopy(model)
        bound.apply(small, choices)
        want = outputs(silenced(model, bound.groups, bound.kept(choices))(x))
        for a, b in zip(outputs(small(x)), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    return bound


CNNS = {
    resnet: {"0": 8, "1.conv1": 8, "2.conv1": 16, "2.conv2": 16},
    Inverted: {"stem": 8, "expand": 32, "squeeze": 4},
    Dense: {"stem": 8, "conv": 12, "gated": 8, "up": 12},
    Shuffled: {"stem": 2, "grouped": 6},
}


@pytest.mark.parametrize("make", CNNS, ids=lambda f: f.__name__)
@torch.no_grad()
def test_cnns_compute_what_the_original_does_without_the_channels(make: type[nn.Module]) -> None:
    bound = check(seeded(make), torch.randn(2, 3, 8, 8))
    assert {n: g.units for n, g in bound.groups.items()} == CNNS[make]


class SelfAttention(nn.Module):
    """As in timm: one layer for queries, keys and values; the width of the input in a reshape."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(self.head_dim)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        scores = (self.q_norm(q) * self.head_dim**-0.5) @ k.transpose(-2, -1)
        if mask is not None:
            scores = scores + mask
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c))


class GroupedQueries(nn.Module):
    """Four heads of queries on two of keys and values, with rotary embedding."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, width)
        self.o = nn.Linear(width, width)
        angles = torch.arange(4.0)[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1])
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def rotated(self, x: Tensor) -> Tensor:
        a, b = x[..., :2], x[..., 2:]
        return x * self.cos + torch.cat([-b, a], -1) * self.sin

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.rotated(self.q(x).view(b, n, self.heads, 4).transpose(1, 2))
        k, v = self.kv(x).view(b, n, 2, -1, 4).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, self.rotated(k), v, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    """Patches, a class token, positions, attention, a gated feed-forward layer."""

    def __init__(self, attention: type[nn.Module], width: int = 16) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.cls = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 4, width))
        self.attention = attention(width, 4)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 48)
        self.down = nn.Linear(24, width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)[:, :3]
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.position
        x = x + self.attention(self.norm(x))
        gate, y = self.up(self.norm(x)).chunk(2, -1)
        return self.head((x + self.down(F.silu(gate) * y))[:, 0])


HEADS = {SelfAttention: ("attention.qkv", 4), GroupedQueries: ("attention.q", 2)}


@pytest.mark.parametrize("attention", HEADS, ids=lambda f: f.__name__)
@torch.no_grad()
def test_heads_go_whole_and_with_their_keys_and_values(attention: type[nn.Module]) -> None:
    name, units = HEADS[attention]
    model = seeded(Transformer, attention)
    bound = check(model, torch.randn(3, 3, 8, 8))
    assert {n: g.units for n, g in bound.groups.items()} == {"patch": 16, name: units, "up": 24}
    assert bound.groups[name].heads
    assert bound.groups["patch"].averaged  # a layer norm is over these
    small = copy.deepcopy(model)
    bound.apply(small, {d.name: d.options[0] for d in bound.decisions})
    assert small(torch.randn(5, 3, 8, 8)).shape == (5, 10)  # any batch
    assert Widths(heads=False).bind(model, torch.randn(1, 3, 8, 8)).groups.keys() == {"patch", "up"}


@torch.no_grad()
def test_torchs_attention_gets_heads_of_its_own_number() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, norm_first=True)
    model = nn.Sequential(nn.Linear(5, 16), layer, nn.Linear(16, 3)).eval()
    x, mask = torch.randn(2, 6, 5), torch.rand(6, 6) < 0.3
    mask.fill_diagonal_(False)
    bound = check(model, x)
    assert {n: g.units for n, g in bound.groups.items()} == {
        "0": 16,
        "1.self_attn": 4,
        "1.linear1": 32,
    }
    small = copy.deepcopy(model)
    choices = {"width:1.self_attn": 1}
    bound.apply(small, choices)
    want = silenced(model, bound.groups, bound.kept(choices))
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    h = model[0](x)
    torch.testing.assert_close(
        small[1](h, mask, padding), want[1].train()(h, mask, padding), rtol=1e-4, atol=1e-5
    )
    made, weights = small[1].self_attn(h, h, h, attn_mask=mask, average_attn_weights=False)
    assert made.shape == (2, 6, 16)
    assert weights.shape == (2, 1, 6, 6)
