"""The shipped families: they conform, take any image, and span what they should."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from espalier import nets
from espalier.errors import DataError, SpaceError
from espalier.testing.family import check_extract, check_family, check_network

pytestmark = pytest.mark.usefixtures("few_drawn")

SHAPES = [(1, 8, 8), (2, 17, 13)]
RNG = np.random.default_rng(0)
# scaled by hand in every decision; the other families have test files of their own
SCALED = ("mobilenet", "resnet")


def macs(network: nn.Module, shape: tuple[int, ...]) -> int:
    total = 0

    def add(module, inputs, output):
        nonlocal total
        positions = output.numel() // output.shape[1] if isinstance(module, nn.Conv2d) else 1
        total += positions * module.weight.numel()

    hooks = [
        m.register_forward_hook(add)
        for m in network.modules()
        if isinstance(m, (nn.Conv2d, nn.Linear))
    ]
    with torch.no_grad():
        network.eval()(torch.zeros(1, *shape))
    for hook in hooks:
        hook.remove()
    return total


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shipped_families_conform(name, shape):
    check_family(nets.make(name, shape, 7), seed=3)


@pytest.mark.parametrize("name", SCALED)
def test_extracts_of_many_random_candidates_compute_what_is_active(name):
    torch.manual_seed(1)
    net = nets.make(name, (3, 12, 12), 4, resolution=(8, 12))
    codes = net.space.sample(12, np.random.default_rng(5))
    for seed, candidate in enumerate(net.space.decode(codes)):
        check_extract(net, candidate, seed)


@pytest.mark.parametrize("name", SCALED)
def test_units_add_up_to_the_macs_of_the_network(name):
    net = nets.make(name, (3, 28, 28), 10)
    for candidate in net.space.decode(net.space.sample(6, np.random.default_rng(2))):
        found = [net.unit(unit.name, candidate) for unit in net.units()]
        parts = sum(macs(*pair) for pair in found if pair is not None)
        assert parts == macs(net.extract(candidate), net.shape)


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 64, 64)], ids=str)
def test_hand_scaling_grows_and_spans_at_least_twentyfold(name, shape):
    net = nets.make(name, shape, 10, resolution=shape[1])
    sizes = [macs(net.extract(net.uniform(s)), shape) for s in np.linspace(0, 1, 9)]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) >= 4
    assert 20 <= sizes[-1] / sizes[0] <= 60


@pytest.mark.parametrize("name", SCALED)
@settings(max_examples=10, deadline=None)
@given(
    channels=st.integers(1, 4),
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    classes=st.integers(2, 20),
)
def test_any_image_and_class_count_will_do(name, channels, height, width, classes):
    net = nets.make(name, (channels, height, width), classes)
    for scale in (0, 1):
        network = net.build(net.uniform(scale)).eval()
        assert network(net.example(2)).shape == (2, classes)


@pytest.mark.parametrize("name", SCALED)
def test_a_large_image_gets_more_stages(name):
    net = nets.make(name, (3, 224, 224), 1000)
    assert {f"stage{i}.depth" for i in range(1, 6)} <= set(net.space.names)
    network = net.build(net.uniform(0)).eval()
    seen = []
    network.get_submodule("head.pool").register_forward_hook(
        lambda m, i, o: seen.append(i[0].shape)
    )
    with torch.no_grad():
        assert network(net.example()).shape == (1, 1000)
    assert seen[0][-1] <= 8


def test_the_decisions_are_those_the_family_names():
    net = nets.MobileNet((3, 16, 16), 10)
    names = set(net.space.names)
    assert {"resolution", "stem.width", "head.width", "stage1.width", "stage2.depth"} <= names
    assert {"stage3.2.kernel", "stage3.2.expansion"} <= names
    assert dict(net.space["stage3.2.kernel"].when) == {"stage3.depth": (3,)}
    assert net.space["stage1.0.kernel"].options == (3, 5)
    assert all(w % 8 == 0 for n in names if n.endswith("width") for w in net.space[n].options)


def test_the_resolution_is_changed_inside_and_only_where_it_differs():
    net = nets.MobileNet((3, 32, 32), 10, resolution=(16, 24, 32))
    small, native = net.extract(net.uniform(0)), net.extract(net.uniform(1))
    assert isinstance(small.resize, nn.Upsample)
    assert tuple(small.resize.size) == (16, 16)
    assert not hasattr(native, "resize")
    assert not any(isinstance(m, (nn.Upsample, nn.Identity)) for m in native.modules())
    assert "resolution" not in nets.MobileNet((1, 8, 8), 10).space
    assert nets.ResNet((3, 28, 28), 10).space["resolution"].options == (16, 20, 28)


def test_options_can_be_given_and_one_option_decides_nothing():
    net = nets.make(
        "mobilenet",
        (3, 16, 16),
        10,
        resolution=16,
        widths=[8, (16, 24), 32],
        depth=2,
        kernel=(3, 5, 7),
        expansion=(1, 1.5),
        stem=8,
        head=40,
    )
    names = set(net.space.names)
    assert names == {"stage2.width"} | {
        f"stage{s}.{i}.{what}"
        for s in (1, 2, 3)
        for i in (0, 1)
        for what in ("kernel", "expansion")
    }
    for candidate in net.space.decode(net.space.sample(4, np.random.default_rng(0))):
        check_network(net, candidate)
        check_extract(net, candidate)
    assert nets.ResNet((3, 16, 16), 10, widths=[8, 8, 8], depth=(1, 4)).space.size > 4


def test_blocks_add_their_input_only_inside_a_stage():
    net = nets.MobileNet((1, 8, 8), 3)
    assert [block.residual for block in net.stage2.children()] == [False, True, True]
    assert [block.filter.conv.stride for block in net.stage2.children()] == [2, 1, 1]


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"widht": 8}, "unknown option of family mobilenet 'widht'. Did you mean 'widths'"),
        ({"widths": [8]}, "each of the 3 stages, got 1"),
        ({"kernel": (3, 4)}, "odd"),
        ({"kernel": ()}, "at least one option"),
        ({"depth": (1, -2)}, "positive numbers, got -2"),
        ({"depth": 1.5}, "whole numbers, got 1.5"),
        ({"stem": "8"}, "positive numbers, got '8'"),
        ({"resolution": (8, 0)}, "positive numbers, got 0"),
    ],
)
def test_options_that_cannot_be_are_refused_in_one_line(options, rule):
    with pytest.raises(SpaceError, match=rule.replace("(", r"\(").replace("?", r"\?")) as refused:
        nets.make("mobilenet", (1, 8, 8), 10, **options)
    assert "\n" not in str(refused.value)


def test_an_unknown_family_names_the_nearest():
    with pytest.raises(SpaceError, match=r"unknown family 'mobilnet'\. Did you mean 'mobilenet'"):
        nets.make("mobilnet", (1, 8, 8), 10)
    with pytest.raises(DataError, match="shape"):
        nets.make("resnet", (8, 8), 10)


@pytest.mark.parametrize("name", sorted(set(nets.FAMILIES) - set(SCALED)))
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 17, 13)], ids=str)
def test_every_family_takes_any_image(name, shape):
    family = nets.make(name, shape, 3)
    smallest = family.space.decode(family.space.repair(family.space.corner(False), RNG))[0]
    assert family.build(smallest)(family.example(2)).shape == (2, 3)


def test_the_registry_lists_without_loading():
    assert {*SCALED, "darts", "hybrid", "nb201-supernet"} < set(nets.FAMILIES)
    assert nets.FAMILIES["resnet"] is nets.ResNet
    with pytest.raises(KeyError):
        nets.FAMILIES["vgg"]
    with pytest.raises(AttributeError):
        nets.NoNet  # noqa: B018


def test_a_convolution_starts_with_the_spread_of_kaiming():
    torch.manual_seed(0)
    net = nets.ResNet((3, 16, 16), 10)
    for network in (net, net.build(net.uniform(1))):
        weight = network.get_submodule("stage3.1.first.conv").weight
        assert float(weight.detach().std()) == pytest.approx(
            (2 / weight[0].numel()) ** 0.5, rel=0.05
        )
        weight = network.get_submodule("stage3.1.second.norm").weight
        assert (weight == 1).all()
