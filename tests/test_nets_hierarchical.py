"""Multi-stage transformers and hybrids: they conform, and reduce tokens as they say."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from espalier.errors import SpaceError
from espalier.nets.hierarchical import HierarchicalViT, Reduce
from espalier.nets.hybrid import Hybrid
from espalier.testing.family import check_family

pytestmark = pytest.mark.usefixtures("few_drawn")


def test_transformers_conform_also_where_sides_are_odd():
    options = {"widths": [(8, 12), (12, 16)], "heads": [(1, 2), 2], "depth": (1, 2)}
    check_family(HierarchicalViT((2, 9, 7), 5, **options, ratio=(0.5, 2), patch=2), seed=3)


def test_hybrids_conform():
    check_family(Hybrid((1, 8, 8), 5, depth=(1, 2), expansion=(1, 1.5), heads=2), seed=3)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 32, 32), (1, 70, 9)], ids=str)
@pytest.mark.parametrize("family", [HierarchicalViT, Hybrid])
def test_any_image_will_do(family, shape):
    net = family(shape, 3)
    for scale in (0, 1):
        assert net.build(net.uniform(scale)).eval()(net.example(2)).shape == (2, 3)


def test_decisions_of_the_transformer():
    net = HierarchicalViT((1, 8, 8), 10)
    names = set(net.space.names)
    assert {"stage1.width", "stage3.depth", "stage2.1.heads", "stage3.2.ratio"} <= names
    assert len(names) == 3 * (2 + 3 * 2)
    assert dict(net.space["stage2.2.ratio"].when) == {"stage2.depth": (3,)}
    assert net.space["stage2.width"].options == (32, 48, 64)


def test_decisions_of_the_hybrid_and_where_it_attends():
    net = Hybrid((1, 8, 8), 10)
    assert len(net.space.names) == 3 * (2 + 3)
    attending = [n for n, m in net.named_modules() if n.endswith("attention")]
    assert attending == [f"stage3.{i}.attention" for i in range(3)]


def test_a_residual_reduction_is_the_convolution_and_the_mean_of_four():
    torch.manual_seed(0)
    layer = Reduce(6, 5, (4, 6), "residual")
    x = torch.randn(2, 24, 6)
    image = x.reshape(2, 4, 6, 6).permute(0, 3, 1, 2)  # rows of tokens are rows of the image
    mean = image.reshape(2, 6, 2, 2, 3, 2).mean((3, 5))
    short = torch.einsum("oi,bihw->bohw", layer.short.weight[:, :, 0, 0], mean)
    normal = functional.layer_norm(x, (6,)).reshape(2, 4, 6, 6).permute(0, 3, 1, 2)
    conv = functional.conv2d(normal, layer.conv.weight, layer.conv.bias, 2, 1)
    expected = (conv + short).permute(0, 2, 3, 1).reshape(2, 6, 5)
    torch.testing.assert_close(layer(x), expected)
    plain = Reduce(6, 5, (4, 6), "plain")
    plain.conv, plain.norm = layer.conv, layer.norm
    torch.testing.assert_close(plain(x), conv.permute(0, 2, 3, 1).reshape(2, 6, 5))


def test_a_plain_reduction_has_no_shortcut():
    nets = [HierarchicalViT((1, 8, 8), 4, reduction=r) for r in ("plain", "residual")]
    plain, residual = (sum(p.numel() for p in n.parameters()) for n in nets)
    assert residual - plain == 32 * 64 + 64 * 128
    assert nets[0].space.names == nets[1].space.names


def test_options_can_be_given_and_one_option_decides_nothing():
    net = HierarchicalViT(
        (1, 16, 16), 5, widths=[16, (24, 32)], heads=[2, (2, 4)], depth=2, ratio=(0.5, 1), patch=4
    )
    assert set(net.space.names) == {"stage2.width", "stage2.0.heads", "stage2.1.heads"} | {
        f"stage{s}.{i}.ratio" for s in (1, 2) for i in (0, 1)
    }
    network = net.build(net.uniform(1))
    seen = []
    network.get_submodule("stage2.1.norm1").register_forward_hook(
        lambda m, i, o: seen.append(tuple(i[0].shape))
    )
    network(net.example(3))
    assert seen == [(3, 4, 32)]


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"reduction": "residul"}, "Did you mean 'residual'"),
        ({"patch": 9}, "at most the image's shorter side"),
        ({"widths": [8, 16]}, None),
        ({"widths": [8, 16, 24, 32]}, "heads needs options for each of the 4 stages"),
    ],
)
def test_options_that_cannot_be_are_refused(options, rule):
    if rule is None:
        assert len(HierarchicalViT((1, 8, 8), 3, **options).space.names) == 2 * (1 + 3 * 2)
        return
    with pytest.raises(SpaceError, match=rule):
        HierarchicalViT((1, 8, 8), 3, **options)


def test_the_attention_of_the_hybrid_is_beside_a_shortcut():
    torch.manual_seed(0)
    net = Hybrid((1, 8, 8), 3, depth=1, widths=[8, 8, 16])
    block = net.stage3.get_submodule("0").eval()
    nn.init.zeros_(block.attention.project.weight)
    nn.init.zeros_(block.attention.project.bias)
    x = torch.randn(2, 16, 2, 2)
    torch.testing.assert_close(block(x), block.mixing(x))
