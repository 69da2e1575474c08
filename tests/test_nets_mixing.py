"""Mixtures of options: exact where one-hot, right in their gradients, and cheap where weights are 0."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import espalier as esp
from espalier import nets
from espalier.nets import elastic
from espalier.testing.family import check_mixing


def one_hot(net, candidate, **kinds):
    """Weights of a candidate: one-hot on its decisions, on the last option of inactive ones."""
    full = {**{d.name: d.options[-1] for d in net.space.decisions}, **candidate}
    return {
        name: F.one_hot(
            torch.tensor(int(net.space[name].code(full[name]))), net.space[name].count
        ).float()
        for name in net.mixable
    }


class Layer(nn.Module):
    def __init__(self, width, i):
        super().__init__()
        inner = elastic.product(width, esp.choice(f"mlp{i}", 1, 1.5, 2))
        self.norm1, self.norm2 = elastic.LayerNorm(width), elastic.LayerNorm(width)
        self.attention = elastic.Attention(width, esp.ordinal(f"heads{i}", 1, 2, 3), head_width=8)
        self.up, self.down = elastic.Linear(width, inner), elastic.Linear(inner, width)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ViT(esp.Supernet):
    """Layer norms, attention, parameters, a product of two mixed sizes, depth."""

    def __init__(self, shape=(1, 8, 8), classes=5):
        super().__init__(shape, classes)
        width = esp.ordinal("width", 8, 16, 24)
        self.patches = elastic.Conv2d(shape[0], width, kernel=2, stride=2, padding=0)
        self.token, self.places = elastic.Parameter(1, 1, width), elastic.Parameter(17, width)
        self.layers = elastic.Repeat(esp.ordinal("depth", 1, 2, 3), lambda i: Layer(width, i))
        self.norm, self.head = elastic.LayerNorm(width), elastic.Linear(width, classes)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token().expand(x.shape[0], -1, -1), x], 1) + self.places()
        return self.head(self.norm(self.layers(x))[:, 0])


class Ops(esp.Supernet):
    """Alternatives, a skip, and decisions that are active inside one alternative only."""

    def __init__(self, shape=(2, 7, 7), classes=3):
        super().__init__(shape, classes)
        width = esp.ordinal("width", 4, 8)
        self.stem = nn.Sequential(elastic.Conv2d(2, width), nn.ReLU())
        self.one = elastic.OneOf(
            esp.choice("op", "conv", "depthwise", "pool"),
            {
                "conv": nn.Sequential(
                    elastic.Conv2d(width, width, esp.choice("kernel", 1, 3, 5)),
                    elastic.BatchNorm2d(width),
                ),
                "depthwise": elastic.DepthwiseConv2d(width),
                "pool": nn.AvgPool2d(3, 1, 1),
            },
        )
        self.skip = elastic.Skippable(esp.choice("skip", False, True), elastic.Conv2d(width, width))
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = elastic.Linear(width, classes)


@pytest.mark.parametrize("make", [ViT, Ops, lambda: nets.MobileNet((1, 8, 8), 4)])
def test_networks_conform(make):
    torch.manual_seed(0)
    check_mixing(make(), seed=3)


def spread_norms(net):
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.bias, -0.3, 0.3)


@pytest.mark.parametrize(
    "make", [ViT, Ops, lambda: nets.MobileNet((1, 8, 8), 4), lambda: nets.ResNet((1, 8, 8), 4)]
)
def test_weights_of_each_sample_give_each_sample_its_own_network(make):
    torch.manual_seed(1)
    net = make().eval()
    spread_norms(net)
    batch = 6
    kernels = [n for n in net.mixable if "kernel" in n]
    fixed = {name: net.space[name].options[0] for name in kernels}
    everything = {**{d.name: d.options[-1] for d in net.space.decisions}, **fixed}
    net.activate(
        net.space.candidate(
            {
                name: everything[name]
                for name in net.space.names
                if all(everything[p] in allowed for p, allowed in net.space[name].when.items())
            }
        )
    )
    rows = net.space.decode(net.space.sample(batch, np.random.default_rng(0)))
    rows = [net.space.candidate({**c, **{n: fixed[n] for n in kernels if n in c}}) for c in rows]
    x = torch.randn(batch, *net.shape)
    if "kernel" in net.space and not net.space["kernel"].when:
        pytest.skip("all samples share a kernel")
    weights = [one_hot(net, row) for row in rows]
    together = {
        name: torch.stack([w[name] for w in weights]) for name in net.mixable if name not in kernels
    }
    if kernels:  # inactive under `op=pool`, so they are given by what all samples share
        together |= {n: F.one_hot(torch.tensor(0), net.space[n].count).float() for n in kernels}
    net.mix(together)
    with torch.no_grad():
        mixed = net(x)
        alone = []
        for i, row in enumerate(rows):
            net.activate(row)
            alone.append(net(x[i : i + 1]))
    assert torch.allclose(mixed, torch.cat(alone), atol=2e-6)
    assert len({tuple(row.items()) for row in rows}) >= 3
