"""Mixtures of options: exact where one-hot, right in their gradients, and cheap where weights are 0."""

from __future__ import annotations

import copy
import pickle
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import espalier as esp
from espalier import nets
from espalier.errors import SpaceError
from espalier.nets import elastic
from espalier.nets.elastic import Gates
from espalier.testing.family import check_mixing


def one_hot(net, candidate):
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


# --- each kind of mixture against an independent sum --------------------------------------------


def random_weights(count, *batch):
    return (0.1 + torch.rand(*batch, count)).requires_grad_()


@pytest.mark.parametrize("batch", [(), (3,)], ids=["shared", "per sample"])
def test_alternatives_skips_and_depths_are_weighted_sums(batch):
    torch.manual_seed(0)
    decision, skip = esp.choice("op", "a", "b", "c"), esp.choice("skip", False, True)
    depth = esp.ordinal("depth", 0, 2, 3)
    a, b, c = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 3, padding=1), nn.Identity()
    one = elastic.OneOf(decision, {"a": a, "b": b, "c": c})
    skippable = elastic.Skippable(skip, a)
    repeat = elastic.Repeat(depth, lambda i: nn.Conv2d(2, 2, 1))
    x = torch.randn(3, 2, 5, 5)
    u, v, w = random_weights(3, *batch), random_weights(2, *batch), random_weights(3, *batch)
    one.mix({"op": u})
    skippable.mix({"skip": v})
    repeat.mix({"depth": w})

    def at(weights, i):
        return weights[..., i].reshape(-1, 1, 1, 1)

    first, second, third = repeat.children()
    two = second(first(x))
    cases = [
        (one, u, at(u, 0) * a(x) + at(u, 1) * b(x) + at(u, 2) * x),
        (skippable, v, at(v, 1) * a(x) + at(v, 0) * x),
        (repeat, w, at(w, 0) * x + at(w, 1) * two + at(w, 2) * third(two)),
    ]
    for module, weights, expected in cases:
        got = module(x)
        assert torch.allclose(got, expected, atol=1e-6)
        grads = [torch.autograd.grad(out.square().sum(), weights)[0] for out in (got, expected)]
        assert torch.allclose(*grads, rtol=1e-4, atol=1e-4)
    one.settle({"op": "c"})
    assert torch.equal(one(x), x)
    repeat.settle({"depth": 2})
    assert torch.equal(repeat(x), two)


@pytest.mark.parametrize("batch", [(), (3,)], ids=["shared", "per sample"])
def test_widths_of_a_product_mask_the_channels_of_every_combination(batch):
    torch.manual_seed(0)
    width, ratio = esp.ordinal("width", 2, 4, 6), esp.choice("ratio", 1, 2)
    conv = elastic.Conv2d(3, elastic.product(width, ratio))
    linear = elastic.Linear(3, elastic.product(width, ratio))
    u, v = random_weights(3, *batch), random_weights(2, *batch)
    mask = torch.zeros(*batch, 12)
    for i, j in product(range(3), range(2)):
        part = u[..., i] * v[..., j]
        mask = mask + part[..., None] * (torch.arange(12) < (2, 4, 6)[i] * (1, 2)[j])
    x = torch.randn(3, 3, 4, 4)
    conv.mix({"width": u, "ratio": v})
    expected = F.conv2d(x, conv.weight, conv.bias, padding=1) * mask.reshape(-1, 12, 1, 1)
    assert torch.allclose(conv(x), expected, atol=1e-6)
    linear.mix({"width": u, "ratio": v})
    tokens = torch.randn(3, 7, 3)
    expected = F.linear(tokens, linear.weight, linear.bias) * mask.reshape(-1, 1, 12)
    assert torch.allclose(linear(tokens), expected, atol=1e-6)
    conv.settle({"width": 4, "ratio": 2})
    conv.mix({"width": u})
    assert conv(x).shape[1] == 12  # of the largest width, at the ratio that is settled


def test_kernels_are_masked_from_the_border_in():
    torch.manual_seed(0)
    conv = elastic.DepthwiseConv2d(4, esp.choice("kernel", 3, 5, 7))
    x, w = torch.randn(2, 4, 9, 9), random_weights(3)
    conv.mix({"kernel": w})
    expected = sum(
        w[i] * F.conv2d(x, conv.weight[..., 2 - i : 5 + i, 2 - i : 5 + i], None, 1, 1 + i, 1, 4)
        for i in range(3)
    )
    assert torch.allclose(conv(x), expected + conv.bias[:, None, None], atol=1e-6)
    with pytest.raises(SpaceError, match=r"share a kernel, so kernel takes weights of shape"):
        conv.mix({"kernel": torch.ones(2, 3)})


def test_norms_use_the_statistics_of_the_samples_that_have_a_channel():
    torch.manual_seed(0)
    norm = elastic.BatchNorm2d(esp.ordinal("width", 2, 4), momentum=1.0)
    x = torch.randn(5, 4, 3, 3) + 2
    wide = torch.tensor([True, False, True, True, False])
    weights = torch.stack([~wide, wide], 1).float()
    norm.mix({"width": weights})
    mask = torch.ones(5, 4, 1, 1)
    mask[~wide, 2:] = 0
    got = norm(x * mask)
    first = F.batch_norm(x[:, :2], None, None, training=True)
    rest = F.batch_norm(x[wide, 2:], None, None, training=True)
    assert torch.allclose(got[:, :2], first, atol=1e-5)
    assert torch.allclose(got[wide, 2:], rest, atol=1e-5)
    assert (got[~wide, 2:] == 0).all()
    var = torch.cat(
        [x[:, :2].transpose(0, 1).flatten(1).var(1), x[wide, 2:].transpose(0, 1).flatten(1).var(1)]
    )
    assert torch.allclose(norm.running_var, var, atol=1e-5)


# --- what weights of 0 cost ---------------------------------------------------------------------


class Counted(nn.Module):
    """Counts its passes."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.passes = inner, 0

    def forward(self, x):
        self.passes += 1
        return self.inner(x)


def test_a_sample_without_any_weight_gives_nothing_and_finite_gradients():
    layer = elastic.LayerNorm(esp.ordinal("width", 2, 4))
    weights = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.5, 0.5]], requires_grad=True)
    x = torch.randn(3, 5, 4, requires_grad=True)
    layer.mix({"width": weights})
    out = layer(x)
    assert not out[1].any()
    (out * torch.randn_like(out)).sum().backward()
    assert torch.isfinite(weights.grad).all()
    assert torch.isfinite(x.grad).all()


def alternatives(count, channels=4):
    decision = esp.choice("op", *range(count))
    ops = {
        i: Counted(nn.Sequential(nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)))
        for i in range(count)
    }
    return elastic.OneOf(decision, ops), list(ops.values())


def kept(run):
    """The numbers that autograd keeps for backward, weights of modules aside."""
    found = {}

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter):
            found[tensor.data_ptr(), tensor.shape] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    return sum(found.values()), out


def test_options_of_weight_zero_are_not_run():
    one, ops = alternatives(4)
    x = torch.randn(2, 4, 5, 5)
    weights = torch.tensor([0.0, 1.0, 0.0, 0.0], requires_grad=True)
    one.mix({"op": weights})
    out = one(x)
    assert [op.passes for op in ops] == [0, 1, 0, 0]
    gradient = torch.autograd.grad(out.sum(), weights)[0]
    assert [bool(g) for g in gradient] == [False, True, False, False]
    for_two = torch.tensor([[0.0, 1, 0, 0], [0, 0, 0, 1]])
    one.mix({"op": for_two})
    assert torch.allclose(one(x), torch.stack([ops[1](x)[0], ops[3](x)[1]]), atol=1e-6)
    one.mix({"op": torch.zeros(4)})
    assert (one(x) == 0).all()


def test_depths_and_widths_of_weight_zero_are_not_run():
    blocks = [Counted(nn.Identity()) for _ in range(3)]
    repeat = elastic.Repeat(esp.ordinal("depth", 1, 2, 3), lambda i: blocks[i])
    repeat.mix({"depth": torch.tensor([0.3, 0.7, 0.0])})
    repeat(torch.ones(1, 2))
    assert [block.passes for block in blocks] == [1, 1, 0]
    conv = elastic.Conv2d(1, esp.ordinal("width", 2, 4, 6))
    conv.mix({"width": torch.tensor([0.5, 0.5, 0.0])})
    assert conv(torch.ones(1, 1, 3, 3)).shape[1] == 4


@pytest.mark.parametrize("running", [0, 2])
def test_gates_have_the_gradient_of_all_paths_at_the_memory_of_one(running):
    torch.manual_seed(running)
    one, ops = alternatives(3)
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    target = torch.randn(2, 4, 5, 5)
    logits = torch.randn(3, requires_grad=True)

    def gates():
        """Binary gates whose gradient is that of the softmax: straight through."""
        soft = logits.softmax(0)
        hard = F.one_hot(torch.tensor(running), 3).float()
        return hard + (soft - soft.detach())

    everything = gates()
    outputs = sum(everything[i] * op(x) for i, op in enumerate(ops))
    leaves = [logits, x, *one.parameters()]
    loss = (outputs * target).sum()
    expected = torch.autograd.grad(loss, leaves, materialize_grads=True)
    idle = tuple(i for i in range(3) if i != running)
    for op in ops:
        op.passes = 0
    one.mix({"op": Gates(gates(), idle)})
    gated, out = kept(lambda: one(x))
    assert [op.passes for op in ops] == [int(i == running) for i in range(3)]
    got = torch.autograd.grad((out * target).sum(), leaves, materialize_grads=True)
    assert [op.passes for op in ops] == [1, 1, 1]
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    assert got[0].abs().min() > 1e-3  # every logit has one, also of what did not run
    single, _ = kept(lambda: gates()[running] * ops[running](x))
    both, _ = kept(lambda: sum(gates()[i] * op(x) for i, op in enumerate(ops)))
    assert gated <= single + x.numel() + 20  # the input, to run the others on
    assert both >= 2.2 * single


def test_gates_work_for_skips_and_inside_a_network():
    torch.manual_seed(0)
    net = Ops().eval()
    x = torch.randn(4, 2, 7, 7)
    soft = {n: torch.zeros(net.space[n].count, requires_grad=True) for n in ("op", "skip")}
    hard = {"op": torch.tensor([1.0, 0, 0]), "skip": torch.tensor([1.0, 0])}
    net.mix({n: hard[n] + soft[n] for n in soft})
    alone = net(x)
    # every gate has the slope of its own small change, the other as it is
    slopes = {}
    with torch.no_grad():
        for name, index in (("op", 1), ("op", 2), ("skip", 1), ("skip", 0)):
            changed = {n: w.clone() for n, w in hard.items()}
            changed[name][index] += 1e-2
            net.mix(changed)
            slopes[name, index] = float((net(x) - alone).sum()) / 1e-2
    net.mix(
        {
            "op": Gates(hard["op"] + soft["op"], (1, 2)),
            "skip": Gates(hard["skip"] + soft["skip"], (1,)),
        }
    )
    out = net(x)
    assert torch.allclose(out, alone, atol=1e-6)
    out.sum().backward()
    for (name, index), slope in slopes.items():
        assert float(soft[name].grad[index]) == pytest.approx(slope, rel=1e-3, abs=1e-3)


def test_halves_are_mixed_as_they_are_run():
    torch.manual_seed(0)
    net, x = ViT().eval(), torch.randn(3, 1, 8, 8)
    candidate = net.uniform(0.5)
    net.activate(candidate)
    rows = {n: w.expand(3, -1) for n, w in one_hot(net, candidate).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        active = net(x)
        net.mix(rows)
        assert torch.allclose(net(x), active, atol=0.02)
    one, _ = alternatives(3)
    found = {}
    for half in (False, True):
        logits = torch.zeros(3, requires_grad=True)
        one.mix({"op": Gates(torch.tensor([0.0, 1.0, 0.0]) + logits, (0, 2))})
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            out = one(torch.ones(2, 4, 5, 5))
        out.float().sum().backward()
        found[half] = logits.grad
    assert torch.allclose(found[False], found[True], rtol=0.02, atol=0.2)


# --- the supernet's side ------------------------------------------------------------------------


def test_what_is_left_out_stays_as_activated_and_activate_ends_a_mixture():
    torch.manual_seed(0)
    net = Ops().eval()
    x = torch.randn(2, 2, 7, 7)
    candidate = net.space.candidate({"width": 4, "op": "pool", "skip": True})
    net.activate(candidate)
    plain = net(x)
    keys, extracted = list(net.state_dict()), net.extract(candidate)
    net.mix({"skip": torch.tensor([0.25, 0.75])})
    mixed = net(x)
    assert not torch.allclose(mixed, plain)
    assert list(net.state_dict()) == keys
    assert torch.allclose(net.extract()(x), extracted(x))
    net.mix({"op": torch.tensor([0.0, 0.0, 1.0])})  # another mixture: the skip is as activated
    assert torch.equal(net(x), plain)
    net.mix({"op": torch.tensor([1.0, 0.0, 0.0])})  # its kernel is inactive: the last option runs
    net.activate({"width": 4, "op": "conv", "kernel": 5, "skip": True})
    active = net(x)
    net.activate(candidate)
    net.mix({"op": torch.tensor([1.0, 0.0, 0.0])})
    assert torch.allclose(net(x), active, atol=1e-6)
    net.activate(candidate)
    assert torch.equal(net(x), plain)


def test_copies_of_a_mixing_supernet_run_what_is_active_and_mix_on_their_own():
    torch.manual_seed(0)
    net = Ops().eval()
    x = torch.randn(2, 2, 7, 7)
    plain = net(x)
    logits = torch.zeros(3, requires_grad=True)
    net.mix({"op": logits.softmax(0)})
    mixed = net(x)
    units = [unit.name for unit in net.units()]  # measured on a copy
    assert units == [unit.name for unit in Ops().units()]
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.allclose(twin(x), plain, atol=1e-6)
        twin.mix({"op": logits.softmax(0)})
        assert torch.allclose(twin(x), mixed, atol=1e-6)
    assert torch.equal(net(x), mixed)


class OwnSize(elastic.Elastic):
    """A module of a user, written without mix."""

    def __init__(self, width):
        super().__init__()
        self.width, self.running = width, 8

    def decisions(self):
        return (self.width,)

    def settle(self, choices):
        self.running = int(choices[self.width.name])

    def forward(self, x):
        return x[:, : self.running]


class Own(esp.Supernet):
    def __init__(self):
        super().__init__((8, 4, 4), 3)
        width = esp.ordinal("width", 4, 8)
        self.cut = OwnSize(width)
        self.conv = elastic.Conv2d(width, 4, esp.choice("kernel", 1, 3))
        self.resize = elastic.Resize(esp.ordinal("resolution", 2, 4), self.shape)
        self.tail = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = elastic.Linear(4, 3)


def test_modules_without_mix_run_but_their_decisions_are_not_mixed():
    net = Own()
    x = torch.randn(2, 8, 4, 4)
    net.activate({"width": 4, "kernel": 1, "resolution": 2})
    assert net.mixable == ("kernel",)
    net.mix({"kernel": torch.tensor([0.5, 0.5])})
    assert net(x).shape == (2, 3)
    assert net.cut.running == 4
    for name, kind in (("width", "OwnSize"), ("resolution", "Resize")):
        with pytest.raises(SpaceError, match=f"'{name}' can't be mixed: {kind} runs one option"):
            net.mix({"kernel": torch.ones(2), name: torch.ones(2)})
    net.activate({"width": 8, "kernel": 3, "resolution": 4})
    assert net(x).shape == (2, 3)


@pytest.mark.parametrize(
    ("weights", "rule"),
    [
        ({"ops": torch.ones(3)}, "unknown decision 'ops'. Did you mean 'op'"),
        ({"op": torch.ones(2)}, r"one number an option, shape (3,) or (batch, 3), got (2,)"),
        ({"op": torch.ones(3).long()}, "must be a tensor of floats"),
        ({"op": Gates(torch.ones(3), (0,))}, "weights that are 0, got 0"),
        ({"op": Gates(torch.ones(1, 3), ())}, r"shape (3,), got (1, 3)"),
        ({"width": Gates(torch.tensor([0.0, 1.0]), (0,))}, "not for the sizes width"),
    ],
)
def test_wrong_mixtures_are_refused_and_leave_what_was_active(weights, rule):
    net = Ops().eval()
    x = torch.randn(2, 2, 7, 7)
    before = net(x)
    with pytest.raises(SpaceError) as refused:
        net.mix({"skip": torch.ones(2), **weights})
    assert rule in str(refused.value)
    assert torch.equal(net(x), before)


def test_a_batch_of_another_size_and_options_of_other_shapes_are_refused():
    net = Ops().eval()
    net.mix({"op": torch.rand(3, 3)})
    with pytest.raises(SpaceError, match="weights for 3 samples got a batch of 2"):
        net(torch.randn(2, 2, 7, 7))
    halves = elastic.Repeat(esp.ordinal("depth", 0, 1), lambda i: nn.AvgPool2d(2))
    halves.mix({"depth": torch.ones(2)})
    with pytest.raises(SpaceError, match="differ in shape can't be mixed"):
        halves(torch.ones(1, 1, 4, 4))


def test_a_module_can_not_take_the_name_of_a_method():
    net = Own()
    with pytest.raises(SpaceError, match="a supernet has a method 'mix'"):
        net.mix = nn.Identity()
