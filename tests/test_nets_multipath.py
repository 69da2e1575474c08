"""Families with an operator a block, and with a superkernel a layer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from espalier import nets
from espalier.errors import SpaceError
from espalier.nets.multipath import MultiPath
from espalier.nets.share import AWAY, SLOPE, START
from espalier.nets.superkernel import Superkernel
from espalier.solvers.relax.expected import counted, expected_cost
from espalier.testing.family import check_family

SMALL = {"depth": (2, 1, 1), "stem": 8, "widths": (8, 8, 16), "head": 16}


def params(network):
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    "family",
    [
        MultiPath((1, 6, 6), 3, (3, 5), (2,), **SMALL),
        Superkernel((1, 6, 6), 3, (3, 5), (2, 3), **SMALL),
    ],
    ids=lambda family: family.name,
)
def test_they_conform(family):
    check_family(family, seed=3)


def test_the_registry_has_them():
    assert nets.FAMILIES["multipath"] is MultiPath
    assert nets.FAMILIES["superkernel"] is Superkernel


def test_a_block_is_one_of_complete_operators_and_nothing_only_where_shapes_allow():
    net = MultiPath((3, 16, 16), 10, stem=8, widths=(16, 24, 32))
    ops = ("k3e3", "k5e3", "k3e6", "k5e6")
    assert net.space["stage1.0.op"].options == ops
    assert net.space["stage1.1.op"].options == ("skip", *ops)
    assert "skip" not in MultiPath((3, 16, 16), 10, zero=False).space["stage1.1.op"].options
    candidate = dict.fromkeys(net.space.names, "k3e3") | {"stage2.1.op": "k5e6"}
    network = net.extract(candidate)
    kernel = network.get_submodule("stage2.1.filter.conv").weight
    assert tuple(kernel.shape) == (24 * 6, 1, 5, 5)
    assert not hasattr(net.extract(candidate | {"stage2.1.op": "skip"}).stage2, "1")


def test_operators_share_nothing_and_superkernels_everything():
    """Against the sum of the operators' parameters, counted one network at a time."""
    multi, single = MultiPath((1, 8, 8), 5), Superkernel((1, 8, 8), 5)
    assert params(single) <= 1.001 * params(single.extract(single.uniform(1.0)))
    alike = {
        name: params(multi.extract(dict.fromkeys(multi.space.names, name)))
        for name in ("k3e3", "k5e3", "k3e6", "k5e6")
    }
    fixed = params(multi.stem) + params(multi.head)
    assert params(multi) == sum(alike.values()) - 3 * fixed
    # one superkernel computes the same as the operator of the same choice
    wanted = {n: v for n, v in single.uniform(1.0).items() if not n.endswith("expansion")}
    wanted |= dict.fromkeys((n for n in single.space.names if n.endswith("expansion")), 3)
    assert params(single.extract(wanted)) == alike["k5e3"]


@pytest.mark.parametrize("family", [MultiPath, Superkernel])
@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"widths": (8, 8)}, "widths needs one number a stage, 3 of them"),
        ({"depth": (1, 2, 3, 4)}, "depth needs one number a stage"),
        ({"kernels": (3, 4)}, "odd"),
        ({"expansions": ()}, "at least one option"),
        ({"stem": 0}, "positive numbers"),
    ],
)
def test_wrong_options_are_refused(family, options, rule):
    with pytest.raises(SpaceError, match=rule):
        family((1, 8, 8), 3, **options)


# --- indicators --------------------------------------------------------------------------------


def kernel_of(net, block):
    return net.get_submodule(f"{block}.filter.conv").weight


def set_norms(net, block, centre, ring, outer):
    """Fills a depthwise kernel so that its parts have these root mean squares."""
    weight = kernel_of(net, block)
    with torch.no_grad():
        weight.fill_(ring)
        weight[:, :, 1:4, 1:4] = centre
        weight[weight.shape[0] // 2 :] *= outer


def superkernel() -> Superkernel:
    torch.manual_seed(0)
    return Superkernel((1, 6, 6), 3, (3, 5), (3, 6), **SMALL)


@pytest.mark.parametrize(
    ("norms", "wanted"),
    [
        ((1.0, 1.0, 1.0), {"kernel": 5, "expansion": 6}),
        ((1.0, 0.5, 1.0), {"kernel": 3, "expansion": 6}),  # a quarter of the square
        ((1.0, 1.0, 0.5), {"kernel": 5, "expansion": 3}),
        ((1.0, 0.0, 0.0), {"kernel": 3, "expansion": 3}),
    ],
)
def test_what_a_layer_uses_is_read_off_the_norms_of_its_kernel(norms, wanted):
    net = superkernel()
    set_norms(net, "stage2.0", *norms)
    chosen = net.chosen()
    for part, option in wanted.items():
        assert chosen[f"stage2.0.{part}"] == option
    net.activate(chosen)


def test_a_layer_whose_kernel_has_faded_is_dropped():
    net = superkernel()
    assert net.chosen()["stage1.1.keep"] is True
    with torch.no_grad():
        kernel_of(net, "stage1.1.module").mul_(0.1)
    chosen = net.chosen()
    assert chosen["stage1.1.keep"] is False
    assert "stage1.1.kernel" not in chosen
    assert params(net.extract(chosen)) < params(net.extract(net.uniform(1.0)))


def test_indicators_run_what_they_name():
    net = superkernel().eval()
    set_norms(net, "stage2.0", 1.0, 0.1, 0.1)
    x = torch.randn(5, 1, 6, 6)
    with torch.no_grad():
        net.mix(net.indicators())
        mixed = net(x)
        net.activate(net.chosen())
        assert torch.allclose(mixed, net(x), atol=1e-3)
        net.activate(net.uniform(1.0))
        assert not torch.allclose(mixed, net(x), atol=1e-3)


def test_thresholds_get_the_gradient_of_the_sigmoid_even_where_a_part_is_closed():
    """Against a supernet with plain weights in the place of the indicators."""
    net = superkernel().eval()
    set_norms(net, "stage2.0", 1.0, 0.3, 1.0)
    x, target = torch.randn(5, 1, 6, 6), torch.randn(5, 3)
    share = {n: w.detach().clone().requires_grad_() for n, w in net.indicators().items()}
    net.mix(share)
    (net(x) * target).sum().backward()
    effect = share["stage2.0.kernel"].grad
    net.mix(net.indicators())
    net.zero_grad()
    (net(x) * target).sum().backward()
    threshold = net.architecture_parameters()["stage2.0.kernel"]
    soft = 1 / (1 + np.exp(-(0.3**2 - START) / SLOPE))
    slope = soft * (1 - soft) / SLOPE
    assert abs(float(effect[1] - effect[0])) > 1e-4
    assert float(threshold.grad) == pytest.approx(-slope * float(effect[1] - effect[0]), rel=1e-3)


def test_a_closed_half_still_tells_what_it_would_give():
    net = superkernel().double().eval()
    x, target = torch.randn(4, 1, 6, 6).double(), torch.randn(4, 3).double()

    def loss(open_share):
        weights = torch.stack([1 - open_share, open_share])
        net.mix({"stage2.0.expansion": weights})
        return (net(x) * target).sum()

    closed = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(closed), closed)
    with torch.no_grad():
        step = (loss(torch.tensor(1e-6).double()) - loss(torch.tensor(-1e-6).double())) / 2e-6
    assert float(gradient) == pytest.approx(float(step), rel=1e-5)
    assert abs(float(gradient)) > 1e-6


def test_a_cost_closes_layers_and_the_weights_feel_it():
    net = superkernel()
    expected = expected_cost(net, counted("macs"))
    chosen = expected.at(net.chosen())
    assert float(expected(net.indicators()).detach()) == pytest.approx(chosen, rel=10 * AWAY)
    expected(net.indicators()).backward()
    thresholds = net.architecture_parameters()
    assert set(thresholds) == set(net.space.names)
    assert all(float(t.grad) < 0 for t in thresholds.values())  # a higher one is cheaper
    assert kernel_of(net, "stage2.0").grad.abs().sum() > 0
