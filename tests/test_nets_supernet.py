"""A module that a user writes from elastic layers is a family, and what leaves it is plain."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import espalier as esp
from espalier.errors import DataError, ExportError, SpaceError
from espalier.nets import elastic
from espalier.testing.family import check_extract, check_family, check_plain, sampled


class Block(nn.Module):
    def __init__(self, width, i):
        super().__init__()
        kernel = esp.choice(f"kernel{i}", 3, 5, 7)
        self.mix = elastic.DepthwiseConv2d(width, kernel, bias=False)
        self.norm = elastic.BatchNorm2d(width)
        self.point = elastic.Conv2d(width, width, kernel=1)

    def forward(self, x):
        return x + self.point(F.gelu(self.norm(self.mix(x))))


class Mixer(esp.Supernet):
    def __init__(self, shape=(3, 8, 8), classes=10):
        super().__init__(shape, classes)
        width = esp.ordinal("width", 8, 16, 24)
        self.stem = elastic.Conv2d(3, width, kernel=esp.choice("kernel", 3, 5, 7), stride=2)
        self.body = elastic.Repeat(esp.ordinal("depth", 1, 2, 3), lambda i: Block(width, i))
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = elastic.Linear(width, classes)


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


class Cells(esp.Supernet):
    """Alternatives, skips, a repeat within a repeat, a width that changes inside."""

    def __init__(self, shape=(2, 9, 7), classes=3):
        super().__init__(shape, classes)
        a, b = esp.ordinal("a", 4, 8), esp.ordinal("b", 8, 12)
        self.stem = nn.Sequential(elastic.Conv2d(2, a), nn.ReLU())
        op = esp.choice("op", "conv", "depthwise", "pool")
        self.one = elastic.OneOf(
            op,
            {
                "conv": elastic.Conv2d(a, a, esp.choice("kernel", 3, 5)),
                "depthwise": elastic.DepthwiseConv2d(a),
                "pool": nn.AvgPool2d(3, 1, 1),
            },
        )
        self.skip = elastic.Skippable(esp.choice("skip", False, True), nn.Conv2d(8, 8, 1))
        self.skip.module = elastic.Conv2d(a, a)
        self.stages = nn.Sequential(
            elastic.Repeat(esp.integer("outer", 0, 2), lambda i: elastic.Conv2d(a, a, stride=2)),
            elastic.Conv2d(a, b),
        )
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1))
        self.head = elastic.Linear(b, classes)


@pytest.mark.parametrize("family", [Mixer, ViT, Cells])
def test_families_that_a_user_writes_conform(family):
    torch.manual_seed(0)
    check_family(family(), seed=1)


def test_the_root_runs_its_children_in_order_unless_it_says_otherwise():
    torch.manual_seed(0)
    net = Mixer().eval()
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(net(x), net.head(net.pool(net.body(net.stem(x)))))


def test_extracted_names_are_those_of_the_supernet():
    net = Mixer()
    candidate = net.space.candidate({"width": 8, "kernel": 5, "depth": 1, "kernel0": 7})
    network = net.extract(candidate)
    named = {n: type(m).__name__ for n, m in network.named_modules() if not list(m.children())}
    assert named == {
        "stem": "Conv2d",
        "body.0.mix": "Conv2d",
        "body.0.norm": "BatchNorm2d",
        "body.0.point": "Conv2d",
        "pool.0": "AdaptiveAvgPool2d",
        "pool.1": "Flatten",
        "head": "Linear",
    }
    assert type(network).__name__ == "Mixer"
    assert network.get_submodule("body.0.mix").kernel_size == (7, 7)


def test_what_is_extracted_can_be_pickled_without_our_classes():
    network = Mixer().extract().eval()
    data = pickle.dumps(network)
    assert b"espalier" not in data
    assert b"test_nets" not in data
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(pickle.loads(data)(x), network(x))


def test_before_the_first_activation_the_largest_runs():
    net = Mixer().eval()
    assert net.active is None
    x = torch.randn(2, 3, 8, 8)
    assert torch.allclose(net(x), net.extract()(x), atol=1e-6)
    before = net(x)
    net.activate(net.uniform(1.0))
    assert torch.equal(net(x), before)


def test_supernets_can_be_copied_and_sent_to_other_processes():
    net = Mixer()
    net.activate(net.uniform(0.5))
    net.units()
    x = torch.randn(2, 3, 8, 8)
    for twin in (pickle.loads(pickle.dumps(net)), copy.deepcopy(net)):
        assert twin.active == net.active
        assert twin.space == net.space
        assert torch.equal(twin.eval()(x), net.eval()(x))
        twin.activate(twin.uniform(0.0))
    assert net.active == net.uniform(0.5)


def test_the_mode_and_frozen_weights_go_along():
    net = Mixer()
    assert net.extract().training
    net.eval()
    network = net.extract()
    assert not any(m.training for m in network.modules())
    assert all(m.training for m in net.build(net.uniform(0)).modules())
    net.head.weight.requires_grad_(False)
    with torch.no_grad():
        network = net.extract()
    assert not network.head.weight.requires_grad
    assert network.stem.weight.requires_grad
    assert network.stem.weight.is_leaf


def test_extracting_works_while_another_candidate_is_active():
    net = Mixer().eval()
    small, large = net.uniform(0), net.uniform(1)
    net.activate(large)
    x = torch.randn(2, 3, 8, 8)
    before = net(x)
    network = net.extract(small)
    assert torch.equal(net(x), before)
    net.activate(small)
    assert torch.allclose(net(x), network(x), atol=1e-6)


def test_modules_that_are_shared_stay_shared():
    class Tied(esp.Supernet):
        def __init__(self):
            super().__init__((1, 4, 4), 2)
            width = esp.ordinal("width", 4, 8)
            self.stem = elastic.Conv2d(1, width)
            self.mixer = elastic.Conv2d(width, width)
            self.again = self.mixer
            self.tail = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
            self.head = elastic.Linear(width, 2)

        def forward(self, x):
            return self.head(self.tail(self.again(self.mixer(self.stem(x)))))

    net = Tied()
    check_family(net)
    assert [u.name for u in net.units()] == ["network"]  # the mixer is called twice
    state = net.extract().state_dict()
    assert not any(name.startswith("again") for name in state)


def test_a_piece_that_is_called_twice_makes_the_network_one_unit():
    class Twice(Mixer):
        def forward(self, x):
            x = self.body(self.body(self.stem(x)))
            return self.head(self.pool(x))

    assert [u.name for u in Twice().units()] == ["network"]


def test_units_name_the_decisions_that_change_them():
    units = {u.name: set(u.decisions) for u in Mixer().units()}
    assert units == {
        "stem": {"width", "kernel"},
        "body.0": {"width", "kernel0"},
        "body.1": {"width", "kernel1"},
        "body.2": {"width", "kernel2"},
        "pool": {"width"},
        "head": {"width"},
    }
    cells = {u.name: set(u.decisions) for u in Cells().units()}
    assert cells["stages.0.1"] == {"a", "outer"} or cells["stages.0.1"] == {"a"}
    assert cells["stages.1"] == {"a", "b", "outer"}
    assert cells["head"] == {"b"}
    assert cells["one"] == {"a", "op", "kernel"}


def test_units_that_do_not_run_are_none():
    net = Cells()
    off = net.space.candidate({**net.uniform(0), "skip": False, "outer": 0})
    on = net.space.candidate({**net.uniform(0), "skip": True, "outer": 1})
    assert net.unit("skip", off) is None
    assert net.unit("stages.0.0", off) is None
    assert net.unit("stages.0.1", on) is None
    module, shape = net.unit("stages.1", on)
    assert shape == (4, 5, 4)
    assert isinstance(module, nn.Conv2d)
    with pytest.raises(SpaceError, match="unknown unit 'stage'"):
        net.unit("stage", on)


def test_a_root_with_weights_of_its_own_is_one_unit():
    class Scaled(Mixer):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def reset_parameters(self):
            nn.init.ones_(self.scale)

        def forward(self, x):
            return super().forward(x) * self.scale

    net = Scaled()
    assert [u.name for u in net.units()] == ["network"]
    assert set(net.units()[0].decisions) == set(net.space.names)
    module, shape = net.unit("network", net.uniform(0))
    assert shape == (3, 8, 8)
    check_plain(module)


def test_fresh_weights_are_fresh_everywhere():
    class Odd(Mixer):
        def __init__(self):
            super().__init__()
            self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), Gain(), nn.Identity())

    net = Odd()
    with torch.no_grad():
        for tensor in [*net.parameters(), *net.buffers()]:
            tensor.fill_(7)
    for tensor in net.build(net.uniform(0.5)).state_dict().values():
        assert not (tensor == 7).any()


class Gain(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def reset_parameters(self):
        nn.init.ones_(self.gain)

    def forward(self, x):
        return x * self.gain


def test_an_own_parameter_without_a_reset_says_what_to_do():
    class Stubborn(Gain):
        reset_parameters = None

    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return x * self.gain

    net = Mixer()
    net.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), Bare())
    net.extract()
    with pytest.raises(ExportError, match=r"Bare holds a parameter.*reset_parameters"):
        net.build(net.uniform(0))


def test_a_forward_that_cannot_be_traced_says_where_and_what_to_change():
    class Peeks(nn.Module):
        def forward(self, x):
            return x if x.mean() > 0 else -x

    net = Mixer()
    net.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), Peeks())
    net(torch.randn(2, 3, 8, 8))
    with pytest.raises(ExportError, match=r"can't trace Peeks\.forward, line \d+.*Skippable") as e:
        net.extract()
    assert "\n" not in str(e.value)


def test_a_functional_dropout_would_stay_on_and_is_refused():
    class Drops(nn.Module):
        def forward(self, x):
            return F.dropout(x, 0.5, training=self.training)

    net = Mixer()
    net.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), Drops())
    with pytest.raises(ExportError, match=r"use the module, such as nn\.Dropout"):
        net.extract()


def test_candidates_of_another_space_are_refused_and_change_nothing():
    net = Mixer()
    net.activate(net.uniform(0))
    good = dict(net.uniform(0))
    for wrong in (
        {**good, "width": 9},
        {**good, "nothing": 1},
        {k: v for k, v in good.items() if k != "width"},
    ):
        for form in (wrong, esp.Candidate(wrong)):
            with pytest.raises(SpaceError):
                net.activate(form)
            with pytest.raises(SpaceError):
                net.build(form)
    assert net.active == net.uniform(0)


@pytest.mark.parametrize(
    ("shape", "classes"),
    [((3, 8), 10), ((3, 0, 8), 10), ((3, 8, 8.5), 10), ("388", 10), ((3, 8, 8), 1), (8, 10)],
)
def test_wrong_shapes_and_class_counts_are_refused_in_one_line(shape, classes):
    with pytest.raises(DataError) as refused:
        esp.Supernet(shape, classes)
    assert "\n" not in str(refused.value)
    assert "got" in str(refused.value)


def test_a_scale_beyond_the_ends_is_refused():
    with pytest.raises(SpaceError, match="0 to 1"):
        Mixer().uniform(1.5)


def test_uniform_scales_every_decision_alike():
    net = Mixer()
    assert dict(net.uniform(0)) == {"depth": 1, "kernel": 3, "kernel0": 3, "width": 8}
    middle = net.uniform(0.5)
    assert dict(middle) == {"depth": 2, "kernel": 5, "kernel0": 5, "kernel1": 5, "width": 16}
    assert net.uniform(1)["width"] == 24


def test_constraints_of_the_class_are_in_the_space():
    class Limited(Mixer):
        constraints = (esp.Forbid({"width": 24, "depth": 3}),)

    net = Limited()
    for candidate in net.space.decode(net.space.sample(200, np.random.default_rng(0))):
        assert (candidate["width"], candidate["depth"]) != (24, 3)
    for candidate in sampled(net, 0):
        check_extract(net, candidate)
