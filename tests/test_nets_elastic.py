"""Elastic layers run the slices they should, and refuse sizes that can't be."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from espalier import space as sp
from espalier.errors import SpaceError
from espalier.nets import elastic
from espalier.nets.elastic.dims import ends, size

WIDTH = sp.ordinal("width", 4, 6, 8)
KERNEL = sp.choice("kernel", 3, 5, 7)


def test_a_convolution_runs_the_first_channels_and_the_centre_of_the_kernel():
    conv = elastic.Conv2d(WIDTH, sp.ordinal("out", 5, 10), KERNEL, stride=2)
    x = torch.randn(2, 6, 9, 9)
    conv.settle({"width": 6, "out": 5, "kernel": 3})
    expected = F.conv2d(x, conv.weight[:5, :6, 2:5, 2:5], conv.bias[:5], stride=2, padding=1)
    assert torch.equal(conv(x), expected)


def test_a_depthwise_convolution_filters_each_channel_alone():
    conv = elastic.DepthwiseConv2d(WIDTH, KERNEL, bias=False)
    x = torch.randn(2, 4, 9, 9)
    conv.settle({"width": 4, "kernel": 5})
    expected = F.conv2d(x, conv.weight[:4, :, 1:6, 1:6], padding=2, groups=4)
    assert torch.equal(conv(x), expected)


def test_gradients_reach_the_slice_and_nothing_else():
    conv = elastic.Conv2d(WIDTH, 8, KERNEL)
    conv.settle({"width": 4, "kernel": 3})
    conv(torch.randn(2, 4, 5, 5)).square().sum().backward()
    used = torch.zeros_like(conv.weight, dtype=torch.bool)
    used[:, :4, 2:5, 2:5] = True
    assert (conv.weight.grad[used] != 0).all()
    assert (conv.weight.grad[~used] == 0).all()


def test_the_largest_form_is_the_weights_themselves():
    conv = elastic.Conv2d(WIDTH, 8, KERNEL)
    assert conv._cut is None
    conv.settle({"width": 4, "kernel": 7})
    conv.settle({"width": 8, "kernel": 7})
    assert conv._cut is None


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_batch_norm_updates_the_statistics_of_its_first_channels_as_torch_does(momentum):
    norm = elastic.BatchNorm2d(WIDTH, momentum=momentum)
    norm.settle({"width": 6})
    plain = nn.BatchNorm2d(6, momentum=momentum)
    for _ in range(3):
        x = torch.randn(4, 6, 5, 5) * 2 + 1
        assert torch.allclose(norm(x), plain(x))
    assert torch.allclose(norm.running_mean[:6], plain.running_mean)
    assert torch.allclose(norm.running_var[:6], plain.running_var)
    assert (norm.running_mean[6:] == 0).all()
    assert (norm.running_var[6:] == 1).all()
    assert isinstance(norm, nn.BatchNorm2d)  # so that what looks for batch norms finds it
    assert torch.allclose(norm.eval()(x), plain.eval()(x))


def test_linear_and_layer_norm_run_their_first_features():
    linear, norm = elastic.Linear(WIDTH, sp.ordinal("out", 3, 5)), elastic.LayerNorm(WIDTH)
    nn.init.normal_(norm.weight)
    choices = {"width": 6, "out": 3}
    linear.settle(choices)
    norm.settle(choices)
    x = torch.randn(2, 7, 6)
    assert torch.allclose(linear(x), F.linear(x, linear.weight[:3, :6], linear.bias[:3]))
    assert torch.allclose(norm(x), F.layer_norm(x, (6,), norm.weight[:6], norm.bias[:6]))


def test_fewer_heads_are_the_first_heads():
    attention = elastic.Attention(WIDTH, sp.ordinal("heads", 1, 2, 4), head_width=4)
    x = torch.randn(2, 5, 8)
    for layer in attention.children():
        layer.settle({"width": 8, "heads": 2})
    torch_own = nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        parts = (attention.query, attention.key, attention.value)
        torch_own.in_proj_weight.copy_(torch.cat([p.weight[:8, :8] for p in parts]))
        torch_own.in_proj_bias.copy_(torch.cat([p.bias[:8] for p in parts]))
        torch_own.out_proj.weight.copy_(attention.project.weight[:8, :8])
        torch_own.out_proj.bias.copy_(attention.project.bias[:8])
    expected = torch_own(x, x, x, need_weights=False)[0]
    assert torch.allclose(attention(x), expected, atol=1e-6)


def test_causal_attention_does_not_look_ahead():
    attention = elastic.Attention(8, 2, head_width=4, causal=True)
    x = torch.randn(1, 6, 8)
    changed = x.clone()
    changed[:, 4:] += 1
    assert torch.allclose(attention(x)[:, :4], attention(changed)[:, :4], atol=1e-6)
    assert not torch.allclose(attention(x)[:, 4:], attention(changed)[:, 4:], atol=1e-3)


def test_products_are_exact_where_whole_and_rounded_where_not():
    half = elastic.product(WIDTH, sp.choice("expansion", 0.5, 1.5, 3))
    assert size(half, {"width": 6, "expansion": 1.5}) == 9
    assert size(elastic.product(WIDTH, 1.1), {"width": 8}) == 8  # 8.8 to a multiple of 8
    assert size(elastic.product(WIDTH, 1.6), {"width": 8}) == 16  # 12.8
    assert size(elastic.product(WIDTH, 1.6, divisor=4), {"width": 8}) == 12
    assert size(elastic.product(WIDTH, 0.1), {"width": 4}) == 8  # never nothing
    assert ends(half) == (2, 24)
    assert ends(elastic.product(16, sp.real("share", 0.5, 1.0))) == (8, 16)
    assert size(elastic.product(half, 2), {"width": 4, "expansion": 3}) == 24


def test_resize_keeps_the_proportions_and_does_nothing_at_the_native_size():
    resize = elastic.Resize(sp.ordinal("resolution", 4, 8), (3, 8, 12))
    x = torch.randn(1, 3, 8, 12)
    resize.settle({"resolution": 4})
    assert resize(x).shape == (1, 3, 4, 6)
    resize.settle({"resolution": 8})
    assert resize(x) is x


def test_containers_run_what_is_chosen():
    blocks = elastic.Repeat(sp.integer("depth", 0, 3), lambda i: Add(10**i))
    x = torch.zeros(1)
    for depth, expected in [(0, 0), (1, 1), (3, 111)]:
        blocks.settle({"depth": depth})
        assert blocks(x).item() == expected
    skip = elastic.Skippable(sp.choice("skip", False, True), Add(5))
    skip.settle({"skip": False})
    assert skip(x).item() == 0
    skip.settle({"skip": True})
    assert skip(x).item() == 5
    one = elastic.OneOf(sp.choice("op", "a.b", "c"), {"a.b": Add(1), "c": Add(2)})
    one.settle({"op": "a.b"})
    assert one(x).item() == 1


class Add(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n

    def forward(self, x):
        return x + self.n


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda: elastic.Conv2d(0, 8), "at least 1"),
        (lambda: elastic.Conv2d(3, 2.5), "whole number"),
        (lambda: elastic.Conv2d(3, True), "whole number"),
        (lambda: elastic.Conv2d(3, "8"), "whole number"),
        (lambda: elastic.Conv2d(3, sp.choice("w", "a", "b")), "positive number"),
        (lambda: elastic.Conv2d(3, sp.choice("w", 0, 8)), "positive number"),
        (lambda: elastic.Linear(3, sp.real("w", 1, 8)), "whole"),
        (lambda: elastic.Conv2d(3, 8, sp.choice("k", 3, 4)), "odd"),
        (lambda: elastic.Conv2d(3, 8, KERNEL, padding=1), "padding"),
        (lambda: elastic.Repeat(sp.choice("d", "a"), Add), "whole depths"),
        (lambda: elastic.Repeat(0, Add), "at least 1"),
        (lambda: elastic.Repeat(sp.real("d", 1, 3), Add), "whole depths"),
        (lambda: elastic.Skippable(sp.choice("s", 1, 2), Add(1)), "True and False"),
        (lambda: elastic.OneOf(sp.choice("o", 1, 2), {1: Add(1)}), "each option"),
        (lambda: elastic.product(WIDTH, "2"), "numbers and decisions"),
        (lambda: elastic.product(WIDTH, 2, divisor=0), "divisor"),
        (lambda: elastic.Conv2d(3, sp.ordinal("w", 1.5, 2)), "must be whole"),
        (lambda: elastic.Parameter(), "at least one size"),
    ],
)
def test_sizes_that_cannot_be_are_refused_in_one_line(make, rule):
    with pytest.raises(SpaceError, match=rule) as refused:
        make()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (elastic.Conv2d(WIDTH, 8), (1, 3, 5, 5)),
        (elastic.BatchNorm2d(WIDTH), (1, 3, 5, 5)),
        (elastic.Linear(WIDTH, 8), (1, 3)),
    ],
)
def test_channels_that_do_not_fit_name_the_size_that_was_declared(layer, shape):
    with pytest.raises(SpaceError, match=r"declared for 8 .*\(width\).* got 3"):
        layer(torch.zeros(shape))
