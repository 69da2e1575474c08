"""Kernel transforms and sorted channels, as Once-for-All shrinks networks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import espalier as esp
from espalier import nets
from espalier.errors import SpaceError
from espalier.nets import elastic
from espalier.nets.elastic.sorting import sort_channels
from espalier.testing.family import check_extract, check_mixing
from test_nets_mixing import ViT, spread_norms

KERNEL = esp.choice("kernel", 3, 5, 7)


def moved(conv):
    with torch.no_grad():
        for step in (5, 3):
            matrix = conv.get_parameter(f"to_{step}")
            matrix += 0.3 * torch.randn_like(matrix)
    return conv


def test_a_transformed_kernel_is_the_centre_of_the_next_times_a_matrix():
    torch.manual_seed(0)
    conv = elastic.DepthwiseConv2d(esp.ordinal("width", 2, 4), KERNEL, transform=True)
    same = elastic.DepthwiseConv2d(esp.ordinal("width", 2, 4), KERNEL)
    same.load_state_dict(conv.state_dict(), strict=False)
    x = torch.randn(2, 2, 9, 9)
    for side in (3, 5, 7):  # the identity at first
        for layer in (conv, same):
            layer.settle({"width": 2, "kernel": side})
        assert torch.allclose(conv(x), same(x), atol=1e-6)
    moved(conv)
    seven = conv.weight[:2]
    five = torch.einsum("ij,cj->ci", conv.to_5, seven[:, 0, 1:6, 1:6].reshape(2, 25))
    three = torch.einsum("ij,cj->ci", conv.to_3, five.reshape(2, 5, 5)[:, 1:4, 1:4].reshape(2, 9))
    made = {7: seven, 5: five.reshape(2, 1, 5, 5), 3: three.reshape(2, 1, 3, 3)}
    outputs = {}
    for side, kernel in made.items():
        conv.settle({"width": 2, "kernel": side})
        outputs[side] = conv(x)
        expected = F.conv2d(x, kernel, conv.bias[:2], padding=side // 2, groups=2)
        assert torch.allclose(outputs[side], expected, atol=1e-5)
    w = torch.tensor([0.5, 0.0, 0.5])
    conv.mix({"kernel": w})
    assert torch.allclose(conv(x), (outputs[3] + outputs[7]) / 2, atol=1e-5)
    conv.settle({"width": 2, "kernel": 3})
    conv(x).sum().backward()
    assert conv.to_3.grad.abs().sum() > 0
    assert conv.to_5.grad.abs().sum() > 0


def test_transforms_are_baked_into_what_is_extracted():
    torch.manual_seed(0)
    fixed = {"widths": [8, (8, 16), 16], "depth": 1, "expansion": 2, "head": 16}
    net = nets.MobileNet((1, 8, 8), 4, stem=8, kernel=(3, 5, 7), transform=True, **fixed)
    for module in net.modules():
        if isinstance(module, elastic.DepthwiseConv2d):
            moved(module)
    for candidate in net.space.decode(net.space.sample(4, np.random.default_rng(0))):
        check_extract(net, candidate)
    check_mixing(net)
    candidate = net.uniform(0.0)
    names = [name for name, _ in net.extract(candidate).named_parameters()]
    assert not any("to_" in name for name in names)
    with pytest.raises(SpaceError, match="transforms need a kernel that is one decision"):
        elastic.Conv2d(1, 1, elastic.product(1, KERNEL), transform=True)


def l1(net, name):
    block = net.get_submodule(name)
    return block.project.conv.weight.detach().abs().sum((0, 2, 3))


def test_sorted_channels_leave_the_largest_network_as_it_was():
    torch.manual_seed(0)
    net = nets.MobileNet((1, 8, 8), 4, transform=True)
    spread_norms(net)
    net.eval()
    net.activate(net.uniform(0.5))
    x = torch.randn(8, 1, 8, 8)
    small = net(x)
    before = net.extract(net.uniform(1.0))(x)
    unsorted = l1(net, "stage2.1").clone()
    done = sort_channels(net)
    assert {"stage2.width", "stage2.width * stage2.1.expansion", "head.width"} <= set(done)
    assert torch.allclose(net.extract(net.uniform(1.0))(x), before, atol=1e-5)
    for name in ("stage1.0", "stage2.1", "stage3.2"):
        found = l1(net, name)
        assert torch.equal(found, found.sort(descending=True)[0])
    assert torch.allclose(l1(net, "stage2.1"), unsorted.sort(descending=True)[0], atol=1e-4)
    assert net.active == net.uniform(0.5)
    assert not torch.allclose(net(x), small, atol=1e-3)  # it keeps other channels now


def test_channels_do_not_cross_the_widths_that_are_kept():
    torch.manual_seed(0)
    net = nets.MobileNet((1, 8, 8), 4, expansion=(2, 3, 4), widths=[8, 16, 24], stem=8)
    spread_norms(net)
    net.eval()
    x = torch.randn(4, 1, 8, 8)
    kept = {**net.uniform(1.0), "stage2.1.expansion": 3}
    net.activate(kept)
    before = net(x)
    weights = l1(net, "stage2.1").clone()
    sort_channels(net, keep={d.name: (3, 4) for d in net.space.decisions if "exp" in d.name})
    assert torch.allclose(net(x), before, atol=1e-5)
    for part in (slice(0, 48), slice(48, 64)):
        got = l1(net, "stage2.1")[part]
        assert torch.allclose(got, weights[part].sort(descending=True)[0], atol=1e-4)
    with pytest.raises(SpaceError, match="has no option 5"):
        sort_channels(net, keep={"stage2.1.expansion": (5,)})


def test_heads_move_as_a_whole_and_what_can_not_move_stays():
    torch.manual_seed(0)
    net = ViT().eval()
    spread_norms(net)
    x = torch.randn(4, 1, 8, 8)
    before = net(x)
    done = sort_channels(net)
    assert {"width", "heads0 * 8", "width * mlp1"} <= set(done)
    assert torch.allclose(net(x), before, atol=1e-5)
    heads = net.layers.get_submodule("0.attention.project").weight.abs().sum(0).reshape(3, 8).sum(1)
    assert torch.equal(heads, heads.sort(descending=True)[0])

    class Fixed(esp.Supernet):
        def __init__(self):
            super().__init__((1, 4, 4), 3)
            width = esp.ordinal("width", 4, 8)
            self.stem = elastic.Conv2d(1, width)
            self.every = nn.Parameter(torch.randn(8, 1, 1))
            self.tail = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
            self.head = elastic.Linear(width, 3)

        def forward(self, x):
            return self.head(self.tail(self.stem(x) * self.every))

    fixed = Fixed()
    x = torch.randn(2, 1, 4, 4)
    before = fixed(x)
    assert sort_channels(fixed) == ()
    assert torch.equal(fixed(x), before)
