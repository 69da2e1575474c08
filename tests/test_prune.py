"""Pruning by gates: masks, budgets, gradients, and what they settle on."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from espalier import tasks
from espalier.compress.gates import Gated
from espalier.compress.gating import unit_gates, weight_gates
from espalier.compress.masks import Bilinear, Place, masked_weight
from espalier.compress.pretrained import Pretrained
from espalier.compress.two_way import TwoWay, pattern, plain, two_way
from espalier.compress.widths import Widths
from espalier.costs import count
from espalier.errors import BudgetError, EspalierError, SpaceError, StudyError
from espalier.recipes._parts.small_cnn import SmallCNN
from espalier.solvers.allocate import totals
from espalier.solvers.prune import (
    BinaryUnits,
    Budget,
    Capped,
    TopUnits,
    bip,
    budgeted,
    dsa,
    pas,
    sparse_budget,
)
from espalier.solvers.prune.budget import hat
from espalier.solvers.prune.counted import count_factors
from espalier.solvers.prune.methods import SETTINGS
from espalier.solvers.prune.nested import nested
from espalier.solvers.prune.soft import log_odds
from espalier.solvers.relax import Moment, Settings
from espalier.solvers.relax.expected import Expected
from espalier.space import Space, ordinal
from espalier.train import Recipe, loop

FAST: Settings = replace(SETTINGS, epochs=2, batch=32, augment=False, precision="fp32")
TRAIN = Moment("architecture", 0, 0.5, torch.Generator().manual_seed(0))


@cache
def task():
    return tasks.make("digits:train=96,validation=64,test=64")


@cache
def family():
    torch.manual_seed(0)
    net = SmallCNN(task().shape, task().classes, (6, 8))
    for module in net.modules():  # norms that a mask must not be fooled by
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
    return Pretrained(net, torch.zeros(2, *task().shape), (Widths(multiple=1, steps=16),))


def product_toy(most=0.5):
    """Two groups of 10 and 8 units in a row, whose cost is the product of their widths."""
    space = Space([ordinal("a", *range(1, 11)), ordinal("b", *range(1, 9))])
    counts = {"a": tuple(range(1, 11)), "b": tuple(range(1, 9))}
    model = nn.Sequential(nn.Linear(10, 8), nn.Linear(8, 3))
    places = {
        "a": [Place("0.weight", torch.arange(10)[None])],
        "b": [Place("1.weight", torch.arange(8)[None])],
    }
    gated = Gated(model, space, counts, places)
    table = torch.arange(1.0, 11)[:, None] * torch.arange(1.0, 9)[None]
    cost = Expected(space.names, {n: space[n].options for n in space.names}, {("a", "b"): table})
    return gated, Budget(gated, [Capped("work", cost, most * 80)])


# --- budgets -----------------------------------------------------------------------------------


def test_weights_beside_a_number_of_units():
    kept = torch.tensor(5.0, requires_grad=True)
    weights = hat(kept, (2, 4, 8))
    assert torch.allclose(weights, torch.tensor([0.0, 0.75, 0.25]))
    cost = weights @ torch.tensor([1.0, 10.0, 20.0])
    (slope,) = torch.autograd.grad(cost, kept)
    assert float(slope) == pytest.approx(10 / 4)
    below = torch.tensor(1.0, requires_grad=True)
    (pull,) = torch.autograd.grad(hat(below, (2, 4, 8)) @ torch.tensor([1.0, 10.0, 20.0]), below)
    assert hat(below, (2, 4, 8)).tolist() == [1, 0, 0]
    assert float(pull) == pytest.approx(9 / 2)  # stays at the end, still wants to move
    assert hat(kept, (3,)).tolist() == [1]


@pytest.mark.parametrize("start", [(1.0, 1.0), (1.0, 0.6), (0.4, 1.0)])
def test_projection_is_the_nearest_within(start):
    _, budget = product_toy(0.3)
    found = budget.project(np.array(start))
    grid = np.linspace(0.1, 1, 400)
    a, b = np.meshgrid(grid, np.clip(grid, 1 / 8, 1), indexing="ij")
    away = np.hypot(a - start[0], b - start[1])
    away[a * b > 0.3] = np.inf
    assert found.prod() <= 0.3 + 1e-6
    assert np.hypot(*(found - start)) <= away.min() + 0.01
    inside = np.array([0.3, 0.4])
    assert np.allclose(budget.project(inside), inside)
    assert budget.project(inside, exact=True).prod() == pytest.approx(0.3, abs=1e-5)


def many_groups(*limits):
    """Eight groups of 10 units; a limit is the groups that it counts and their most units."""
    names = [f"g{i}" for i in range(8)]
    counts = dict.fromkeys(names, tuple(range(1, 11)))
    space = Space([ordinal(n, *counts[n]) for n in names])
    model = nn.Sequential(*(nn.Linear(10, 10) for _ in names))
    places = {n: [Place(f"{i}.weight", torch.arange(10)[None])] for i, n in enumerate(names)}
    options = {n: space[n].options for n in names}
    grid = torch.arange(1.0, 11)
    capped = [
        Capped(f"limit{i}", Expected(space.names, options, {(n,): grid for n in of}), most)
        for i, (of, most) in enumerate(limits)
    ]
    return Budget(Gated(model, space, counts, places), capped)


def test_projection_up_goes_all_the_way_to_the_limit():
    budget = many_groups(([f"g{i}" for i in range(8)], 72.0))
    found = budget.project(np.full(8, 0.1), exact=True)
    assert found == pytest.approx(np.full(8, 0.9), abs=1e-5)
    assert sum(budget.settle(np.full(8, 0.1)).values()) == 72


def test_projection_keeps_limits_that_have_nothing_in_common():
    budget = many_groups((["g0", "g1"], 12.0), (["g2"], 3.0))
    found = budget.project(np.ones(8))
    assert found == pytest.approx(np.array([0.6, 0.6, 0.3, 1, 1, 1, 1, 1]), abs=1e-5)
    assert list(budget.settle(np.ones(8)).values()) == [6, 6, 3, 10, 10, 10, 10, 10]


def test_settles_on_what_fits_and_leaves_nothing():
    gated, budget = product_toy(0.5)
    for start in ((1.0, 1.0), (0.2, 0.9), (0.9, 0.3)):
        found = budget.settle(np.array(start))
        a, b = found["a"], found["b"]
        assert a * b <= 40
        assert a == 10 or (a + 1) * b > 40
        assert b == 8 or a * (b + 1) > 40
    assert budget.settle(np.array([0.9, 0.3]))["a"] > budget.settle(np.array([0.2, 0.9]))["a"]
    with pytest.raises(BudgetError, match="smallest model has 1"):
        Budget(gated, [replace(budget.capped[0], most=0.5)])


def test_costs_are_those_of_the_network():
    gated = unit_gates(family())
    budget = budgeted(gated, {"macs": "50%", "params": 1500})
    rng = np.random.default_rng(1)
    for candidate in family().space.decode(family().space.sample(4, rng)):
        shares = np.array([candidate[n] / gated.units[n] for n in budget.names])
        built = count(family().build(candidate), family().example())
        assert budget.costs(shares) == pytest.approx([built.macs, built.params])
    whole = count(family().model, family().example()).macs
    assert [one.most for one in budget.capped] == [whole / 2, 1500]


def test_many_widths_are_counted_from_few():
    """Priced at three widths of each group; the whole is not priced by all combinations."""
    torch.manual_seed(0)
    wide = SmallCNN(task().shape, task().classes, (12, 14))
    cuts = (Widths(multiple=1, steps=100),)
    many = Pretrained(wide, torch.zeros(2, *task().shape), cuts)
    assert max(d.count for d in many.space.decisions) == 13
    codes = many.space.sample(5, np.random.default_rng(0))
    for metric in ("macs", "params", "bytes"):
        found = totals(many.space, count_factors(many, metric), codes)
        built = [count(many.build(c), many.example()) for c in many.space.decode(codes)]
        assert found.tolist() == pytest.approx([getattr(b, metric) for b in built])


@pytest.mark.parametrize(
    ("within", "says"),
    [
        ({}, "under a limit"),
        ({"macs": ">= 10"}, "from above"),
        ({"colour": 3}, "no cost gives 'colour'"),
        ({"macs": 10}, "smallest model"),
        ({"activation_bytes": "50%"}, "peak"),
    ],
)
def test_limits_that_gates_cannot_keep(within, says):
    with pytest.raises(BudgetError, match=says):
        budgeted(unit_gates(family()), within)


# --- masks -------------------------------------------------------------------------------------


def test_masks_compute_what_the_cut_network_does():
    gated = unit_gates(family()).eval()
    assert gated.mixable == family().space.names
    x = torch.randn(3, *task().shape)
    rng = np.random.default_rng(0)
    for candidate in family().space.decode(family().space.sample(3, rng)):
        gated.scores = {n: torch.rand(u) for n, u in gated.units.items()}
        gated.activate(candidate)
        network = gated.network()
        built = sum(p.numel() for p in network.parameters())
        assert built < sum(p.numel() for p in gated.parameters())
        assert torch.allclose(gated(x), network(x), atol=1e-4)
    gated.mix({})
    assert torch.equal(gated(x), family().model(x))


class Attends(nn.Module):
    """A transformer's block on sequences `(b, n, 8)` and a classifier."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.up, self.down, self.linear = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x):
        y = self.norm1(x)
        heads = [m(y).unflatten(-1, (-1, 2)).transpose(1, 2) for m in (self.q, self.k, self.v)]
        seen = functional.scaled_dot_product_attention(*heads)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        x = x + self.down(functional.gelu(self.up(self.norm2(x))))
        return self.linear(x.mean(1))


def test_heads_carry_masks_and_what_a_norm_averages_does_not():
    torch.manual_seed(0)
    found = Pretrained(Attends(), torch.randn(2, 5, 8), (Widths(multiple=1, steps=4),))
    gated = unit_gates(found).eval()
    assert {gated.units[n] for n in gated.mixable} == {4, 12}  # heads, inner channels
    smallest = {n: found.space[n].options[0] for n in gated.mixable}
    gated.activate(found.space.candidate({**found.original, **smallest}))
    x = torch.randn(3, 5, 8)
    assert torch.allclose(gated(x), gated.network()(x), atol=1e-5)
    gated.mix({})
    assert torch.equal(gated(x), found.model(x))


def test_masks_are_refused_by_name_and_length():
    gated, _ = product_toy()
    with pytest.raises(SpaceError, match="Did you mean"):
        gated.mix({"aa": torch.ones(10)})
    with pytest.raises(SpaceError, match=r"must be \(10,\), got \(9,\)"):
        gated.mix({"a": torch.ones(9)})
    with pytest.raises(EspalierError, match="no convolution"):
        weight_gates(nn.BatchNorm2d(3))
    with pytest.raises(EspalierError, match="unknown layer"):
        weight_gates(nn.Linear(2, 2), ["conv"])


def test_shared_weights_have_one_mask_and_made_ones_none():
    tied = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 4))
    tied[2].weight = tied[0].weight
    nn.utils.parametrizations.weight_norm(tied[3])
    gated = weight_gates(tied)
    assert gated.mixable == ("sparsity:0",)
    gated.mix({"sparsity:0": torch.zeros(16)})
    x = torch.randn(2, 4)
    wanted = tied[3](tied[2].bias.expand(2, 4))
    assert torch.allclose(gated.eval()(x), wanted, atol=1e-6)
    with pytest.raises(EspalierError, match="weights of '3' are computed"):
        weight_gates(tied, ["3"])
    words = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False))
    words[1].weight = words[0].weight
    gated = weight_gates(words)  # the classifier's mask is the embedding's too
    gated.mix({"sparsity:1": torch.zeros(24)})
    assert not gated.eval()(torch.tensor([[1, 2]])).any()


def test_gradient_of_a_mask_whose_weights_follow():
    """On a linear loss c z the weights settle at -m c / curvature, and the loss is -(m c)^2 / it."""
    c, curvature = torch.tensor([1.0, -2.0, 0.5]), 0.7
    m = torch.tensor([1.0, 0.5, 0.0], requires_grad=True)
    w = -m.detach() * c / curvature
    (c * masked_weight(w, Bilinear(m, curvature), None)).sum().backward()
    assert torch.allclose(m.grad, -2 * m.detach() * c**2 / curvature)


def test_importances_are_scales_or_what_reads_the_unit():
    gated = unit_gates(family())
    found = gated.importances(even=False)
    norms = [family().model.norm, family().model.body[0].norm2]
    mean = torch.stack([n.weight.detach() for n in norms]).mean(0)
    assert torch.allclose(found["width:conv"], mean + 1e-6)
    toy, _ = product_toy()
    weight = toy.model[0].weight.detach()
    assert torch.allclose(toy.importances(even=False)["a"], weight.norm(dim=0) + 1e-6)


# --- gates -------------------------------------------------------------------------------------


def test_soft_threshold_keeps_its_share_with_the_right_gradient():
    importance = [torch.rand(9) + 0.1, torch.rand(5) + 0.1]
    shares = [torch.tensor([0.4]), torch.tensor([0.7])]
    p = [torch.sigmoid(o) for o in log_odds(shares, importance, 6.0)]
    assert float(p[0].sum()) == pytest.approx(0.4 * 9, abs=1e-3)
    assert float(p[1].sum()) == pytest.approx(0.7 * 5, abs=1e-3)
    assert p[0].argsort().tolist() == importance[0].argsort().tolist()
    share = torch.tensor([0.4], dtype=torch.float64, requires_grad=True)
    b = importance[0].double()
    of = torch.arange(9.0, dtype=torch.float64)

    def value(at):
        return (torch.sigmoid(log_odds([at], [b], 6.0)[0]) * of).sum()

    (slope,) = torch.autograd.grad(value(share), share)
    with torch.no_grad():
        apart = (value(share + 1e-3) - value(share - 1e-3)) / 2e-3
    assert float(slope) == pytest.approx(float(apart), rel=1e-3)


def test_binary_units_close_and_come_back():
    gated, _ = product_toy()
    gates = BinaryUnits()
    logits = gates.start(gated, gated.mixable, torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits["a"].copy_(torch.tensor([0.9, 0.4, 0.6, *[0.1] * 7]))
        logits["b"].fill_(0.2)
        logits["b"][3] = 0.3
    assert gates.weights(logits, TRAIN)["a"].tolist() == [1, 0, 1] + [0] * 7
    assert gates.weights(logits, TRAIN)["b"].tolist() == [0, 0, 0, 1, 0, 0, 0, 0]  # the least
    gates.kept(logits)["a"].backward()
    assert logits["a"].grad.tolist() == [1] * 10  # closed ones too
    with torch.no_grad():
        logits["a"][1] = 1.7
    gates.after_step(logits, {})
    assert float(logits["a"][1].detach()) == 1.0
    assert float(gates.kept(logits)["a"].detach()) == 3


@pytest.mark.parametrize("most", [0.7, 0.2])
def test_top_units_are_the_best_that_fit(most):
    gated, budget = product_toy(most)
    gates = TopUnits(budget)
    logits = gates.start(gated, gated.mixable, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for found in logits.values():
            found.copy_(torch.rand(len(found)))
    gates.after_step(logits, {})
    masks = {n: m.weights.detach().bool() for n, m in gates.weights(logits, TRAIN).items()}
    kept = {n: int(m.sum()) for n, m in masks.items()}
    assert kept["a"] * kept["b"] <= most * 80
    worst_in = min(float(logits[n][m].detach().min()) for n, m in masks.items())
    closed = [(float(s), n) for n, m in masks.items() for s in logits[n][~m].detach()]
    best_out, where = max(closed)
    assert best_out < worst_in
    kept[where] += 1
    assert kept["a"] * kept["b"] > most * 80


def test_more_than_channels_gates_refuse():
    with pytest.raises(SpaceError, match="make it a Gated"):
        BinaryUnits().start(nn.Linear(2, 2), ["a"], torch.Generator())


# --- methods -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [dsa, pas, bip])
def test_methods_settle_within_the_limit(method):
    found = method(family(), task(), {"macs": "50%"}, settings=FAST)
    network = found.network()
    whole = count(family().model, family().example()).macs
    macs = count(network, family().example()).macs
    assert found.costs["macs"] == pytest.approx(macs)
    assert 0.4 * whole < macs <= 0.5 * whole
    x = torch.randn(4, *task().shape)
    assert torch.allclose(found.gated.eval()(x), network(x), atol=1e-4)
    assert all(type(m).__module__.split(".")[0] != "espalier" for m in network.body[0].children())
    assert found.to_json()["candidate"] == found.candidate.to_json()
    learned = dict(found.model.named_parameters())
    assert not torch.equal(learned["conv.weight"], family().model.conv.weight)


@pytest.mark.parametrize("method", [dsa, pas, bip])
def test_a_killed_run_ends_in_the_same_bits(tmp_path, method):
    if method is bip:  # its threshold is looked for every fourth step, an epoch has three
        method = partial(bip, rate=0.5)
    whole = method(family(), task(), {"macs": "50%"}, settings=FAST)

    def stop(done, total, text):
        raise KeyboardInterrupt

    at = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        method(family(), task(), {"macs": "50%"}, settings=FAST, checkpoint=at, progress=stop)
    again = method(family(), task(), {"macs": "50%"}, settings=FAST, checkpoint=at)
    assert again.candidate == whole.candidate
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor)


def test_single_weights_are_pruned_to_a_share():
    model = family().model
    found = bip(model, task(), 0.2, settings=replace(FAST, epochs=1))
    network = found.network()
    layers = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    kept = sum(int((m.weight != 0).sum()) for m in layers)
    whole = sum(m.weight.numel() for m in layers)
    assert 0.19 * whole < kept <= 0.2 * whole
    with pytest.raises(BudgetError, match="share of weights"):
        sparse_budget(weight_gates(model), 1.5)


# --- nested levels -----------------------------------------------------------------------------


def test_levels_are_inside_one_another():
    recipe = Recipe(epochs=1, batch=32, lr=0.02, augment=False, precision="fp32")
    within = [{"macs": "70%"}, {"macs": "40%"}]
    net = nested(family(), task(), within, recipe)
    assert net.candidates[0] == family().original
    x = torch.randn(4, *task().shape)
    sizes, open_ = [], []
    for level in range(3):
        net.run(level)
        network = net.eval().network(level)
        assert torch.allclose(net(x), network(x), atol=1e-4)
        sizes.append(count(network, family().example()).macs)
        kept = {n: net.gated.kept(n, net.candidates[level][n]) for n in net.gated.mixable}
        open_.append(net.gated.hard(kept))
    assert sizes[1] <= 0.7 * sizes[0]
    assert sizes[2] <= 0.4 * sizes[0]
    for outer, inner in pairwise(open_):
        assert all((inner[n] <= outer[n]).all() for n in inner)
    norms = [m for m in family().model.modules() if isinstance(m, nn.BatchNorm2d)]
    extra = sum(4 * 4 * m.num_features + 4 for m in norms)  # four vectors and a counter
    whole = sum(4 * t.numel() for t in family().model.state_dict().values())
    scores = 4 * sum(net.gated.units.values())
    assert net.bytes() == {"all": whole + 2 * extra + scores, "one": whole}


def test_levels_that_were_killed_end_in_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "_SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    recipe = Recipe(epochs=2, batch=32, lr=0.02, augment=False, precision="fp32")
    within = [{"macs": "60%"}]
    whole = nested(family(), task(), within, recipe, rate=0.5)

    def stop(done, total, text):
        raise KeyboardInterrupt

    at = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        nested(family(), task(), within, recipe, rate=0.5, checkpoint=at, progress=stop)
    with pytest.raises(StudyError, match=r"rate was 0\.5"):
        nested(family(), task(), within, recipe, rate=0.1, checkpoint=at)
    again = nested(family(), task(), within, recipe, rate=0.5, checkpoint=at)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize("changed", [{"label_smoothing": 0.5}, {"precision": "bf16"}])
def test_levels_learn_by_the_whole_recipe(changed):
    plain = Recipe(epochs=1, batch=32, augment=False, precision="fp32", label_smoothing=0.0)
    within = [{"macs": "60%"}]
    first = nested(family(), task(), within, plain).gated.model.linear.weight
    second = nested(family(), task(), within, replace(plain, **changed)).gated.model.linear.weight
    assert not torch.equal(first, second)


def test_levels_get_tighter():
    with pytest.raises(BudgetError, match="get tighter"):
        nested(family(), task(), [{"macs": "40%"}, {"macs": "60%"}], Recipe(epochs=1))


# --- N:M in both directions --------------------------------------------------------------------


def test_two_ways_run_their_own_patterns():
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, 3, padding=1)
    w = conv.weight.detach().clone()
    forward, backward = pattern(w, 1, 4, 1), pattern(w, 1, 4, 0)
    assert forward.sum(1).eq(1).all()
    assert backward.reshape(2, 4, 4, 3, 3).sum(1).eq(1).all()
    assert torch.equal((w.abs() * forward).sum(1), w.abs().amax(1))
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    g = torch.randn(2, 8, 5, 5)
    model = nn.Sequential(conv)
    assert two_way(model, TwoWay(1, 4, decay=0.1)) == ["0"]
    out = model(x)
    assert torch.allclose(out, functional.conv2d(x, w * forward, conv.bias, padding=1), atol=1e-6)
    out.backward(g)
    to_x = functional.conv_transpose2d(g, w * backward, padding=1)
    assert torch.allclose(x.grad, to_x, atol=1e-5)
    dense = w.clone().requires_grad_()
    functional.conv2d(x.detach(), dense, padding=1).backward(g)
    assert torch.allclose(conv.weight.grad, dense.grad + 0.1 * (1 - forward) * w, atol=1e-4)
    plain(model)
    assert type(conv) is nn.Conv2d
    assert torch.equal(conv.weight.detach(), w * forward)


def test_two_ways_want_whole_runs():
    with pytest.raises(EspalierError, match="smaller M"):
        two_way(nn.Linear(6, 8), TwoWay())
    with pytest.raises(EspalierError, match="got 8:8"):
        TwoWay(8, 8)
