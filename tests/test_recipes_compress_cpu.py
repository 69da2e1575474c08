"""Recipes on measured latency, and the benchmark's own models: they run, and their checks can fail."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from espalier import recipes
from espalier.nets.metapath import ATTENTION, IDENTITY, POOL, MetaPath
from espalier.recipes import efficientformer, fast_sparse_conv, lowformer, pflayer
from espalier.recipes._parts.measured import Clock, Counted, even, params, widest
from espalier.recipes._parts.slimming import Slimming, met
from espalier.recipes._parts.sparse import KERNELS, Engine, Gradual, block_mask, network


class Told(Clock):
    """A clock that has been told the time of a network by its number of parameters."""

    how = "told"

    def __init__(self, ms):
        self.told = ms

    def rounds(self, networks, example):
        return [[self.told(params(network))] for network in networks]


# --- what they share ----------------------------------------------------------------------------------


def test_the_widest_is_found_though_latency_does_not_grow_with_width():
    def make(scale):
        return nn.Linear(round(10 * scale), 1, bias=False)

    slow = {3: 9.0, 5: 9.0}  # two sizes that the kernels dislike
    clock = Told(lambda size: slow.get(size, float(size)))
    x = torch.zeros(1, 10)
    scales = [s / 10 for s in range(1, 11)]
    assert widest(make, scales, 0.65, make(1.0), clock, x) == (0.6, 0.6)
    assert widest(make, scales, 0.55, make(1.0), clock, x) == (0.4, 0.4)
    assert widest(make, scales, 0.01, make(1.0), clock, x) == (0.1, 0.1)  # none keeps it
    assert [even(w) for w in (1, 5, 6, 7, 14.1)] == [4, 4, 8, 8, 16]


def test_the_made_up_processor_counts_by_hand():
    net = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.ReLU())
    pointwise, depthwise = 2 * 4 * 9, 4 * 9 * 9
    expected = 2 * 0.002 + (pointwise + 6 * depthwise) / 1e6
    assert Counted().ms([net], torch.zeros(1, 2, 3, 3)) == [pytest.approx(expected)]


# --- PfLayer ------------------------------------------------------------------------------------------


def test_pflayer_runs():
    found = recipes.run("pflayer")
    assert json.loads(json.dumps(found)) == found
    rows = found["networks"]
    assert found["pooled"] == [False, True] * 2
    # each pool saves a 3x3 convolution of half of the width, and its norm
    saved = sum(9 * b * b + 2 * b for b in (w // 2 for w in pflayer.PLANS["smoke"].widths))
    assert rows["original"]["params"] - rows["pooled"]["params"] == saved
    assert rows["narrow"]["latency"] <= rows["pooled"]["latency"]


@pytest.mark.parametrize(
    ("latency", "accuracies", "holds"),
    [
        (0.7, (0.60, 0.595, 0.59), True),
        (0.81, (0.60, 0.595, 0.59), False),  # not 20% faster
        (0.7, (0.60, 0.585, 0.58), False),  # more than a point lost
        (0.7, (0.60, 0.595, 0.595), False),  # no better than a narrower one
    ],
)
def test_pflayer_check_can_fail(latency, accuracies, holds):
    rows = {
        name: {"accuracy": accuracy, "latency": latency}
        for name, accuracy in zip(("original", "pooled", "narrow"), accuracies, strict=True)
    }
    assert pflayer.checked(rows)["holds"] is holds


# --- LowFormer ----------------------------------------------------------------------------------------


def test_lowformer_runs():
    found = recipes.run("lowformer")
    assert json.loads(json.dumps(found)) == found
    by = {(r["place"], r["block"]): r for r in found["profile"]}
    w, pixels = lowformer.PLANS["smoke"].widths[1], 16
    assert by["stage2", "inverted"]["macs"] == pixels * (8 * w * w + 36 * w)
    assert by["stage2", "fused"]["macs"] == pixels * 10 * w * w
    assert found["networks"]["macs"]["choice"]["stage2"] == "inverted"
    assert found["networks"]["ms"]["choice"]["stage2"] == "fused"
    assert {d["fewer"] for d in found["disagreements"]} == {"stage1 inverted", "stage2 inverted"}


def test_disagreements_are_pairs_whose_orders_differ():
    def row(name, macs, ms):
        return {"place": "stage1", "block": name, "macs": macs, "ms": ms}

    rows = [row("a", 1, 2.0), row("b", 2, 1.0), row("c", 3, 1.9), row("d", 3, 0.1)]
    found = {(d["fewer"][-1], d["more"][-1]) for d in lowformer.disagreements(rows)}
    # c is within a tenth of a, and c and d have equal work
    assert found == {("a", "b"), ("a", "d"), ("b", "d")}
    assert lowformer.chosen(rows, "macs") == {"stage1": "a"}
    assert lowformer.chosen(rows, "ms") == {"stage1": "d"}
    assert lowformer.chosen(rows[:1] + rows[2:3], "ms") == {"stage1": "a"}  # as fast, less work


@pytest.mark.parametrize("slim", [False, True])
def test_attention_looks_at_every_pixel(slim):
    torch.manual_seed(0)
    layer = lowformer.Attention(8, slim).eval()
    x = torch.randn(2, 8, 4, 4)
    other = x.clone()
    other[0, :, 0, 0] += 1
    changed = (layer(other) - layer(x)).abs().amax(1)
    assert changed.shape == (2, 4, 4)
    assert (changed[0] > 0).all()
    assert not changed[1].any()


@pytest.mark.parametrize(
    ("accuracy", "ratio", "pairs", "holds"),
    [(0.595, 0.8, 1, True), (0.58, 0.8, 1, False), (0.6, 0.9, 1, False), (0.6, 0.8, 0, False)],
)
def test_lowformer_check_can_fail(accuracy, ratio, pairs, holds):
    networks = {"macs": {"accuracy": 0.6}, "ms": {"accuracy": accuracy}}
    assert lowformer.checked(networks, ratio, 1.0, pairs)["holds"] is holds


# --- EfficientFormer ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def space():
    return MetaPath((1, 8, 8), 4, widths=[4, (4, 8), (8, 12, 16)], heads=1).space


def test_efficientformer_runs():
    found = recipes.run("efficientformer")
    assert json.loads(json.dumps(found)) == found
    check, rows = found["check"], found["networks"]
    assert check["latency"] <= check["target"]
    assert rows["uniform"]["latency"] <= rows["slimmed"]["latency"]
    assert len(found["actions"]) > 0


CHANCES = {
    "stage1.0.op": [0.2, 0.8],
    "stage1.1.op": [0.4, 0.6],
    "stage2.0.op": [0.1, 0.9],
    "stage2.1.op": [0.25, 0.75],
    "stage3.0.op": [0.25, 0.25, 0.5],
    "stage3.1.op": [0.1, 0.3, 0.6],
}


def test_slimming_takes_the_least_importance_for_a_millisecond(space):
    """Prices by which every block takes 1 ms and every channel 0.1: the order can be had by hand."""

    def price(codes):
        rows = [c.to_json() for c in space.decode(codes)]
        ops = [sum({IDENTITY: 0, POOL: 1, ATTENTION: 2}[v] for k, v in r.items() if k.endswith("op")) for r in rows]  # fmt: skip
        return np.array([o + 0.1 * (r["stage2.width"] + r["stage3.width"]) for o, r in zip(ops, rows, strict=True)])  # fmt: skip

    slim = Slimming(space, CHANCES, price)
    assert slim.importance["stage3.1.op"] == {POOL: pytest.approx(3), ATTENTION: pytest.approx(6)}
    steps = list(slim.path())
    # drop 1.5 for 1 ms; pool 2 - 1 for 1 ms; shrink stage 3 (8) by a quarter is 2 for 0.4 ms
    assert [s["action"] for s in steps[1:4]] == [
        "pool stage3.0.op",
        "drop stage3.0.op",
        "drop stage1.1.op",
    ]
    assert all(a["ms"] > b["ms"] for a, b in pairwise(steps))
    last = space.decode(steps[-1]["codes"])[0]
    assert {last[name] for name in CHANCES} == {IDENTITY}
    assert (last["stage2.width"], last["stage3.width"]) == (4, 8)


def test_what_is_measured_corrects_the_table(space):
    """The answer is the first network that keeps the target as measured, wherever the table points."""
    decode = space.decode

    def price(codes):
        return np.array([sum(1.0 for v in c.values() if v not in (IDENTITY,)) for c in decode(codes)]) + np.asarray(codes).sum(1) / 100  # fmt: skip

    slim = Slimming(space, CHANCES, price)
    steps = [decode(s["codes"])[0] for s in slim.path()]
    for first in (1, 4, 7):
        shares = {c: 0.6 if i < first else 0.5 for i, c in enumerate(steps)}
        found = met(slim, lambda c: c, 0.55, lambda c, known=shares: known.get(c, 0.6))
        assert found["candidate"] == steps[first]
        assert found["share"] == 0.5
        assert len(found["actions"]) == first
        # one option more would fit, after more than one step: it is given back
        found = met(slim, lambda c: c, 0.55, lambda c, known=shares: known.get(c, 0.54))
        assert found["share"] == (0.5 if first == 1 else 0.54)
        assert (found["candidate"] in steps) is (first == 1)
        assert found["actions"][-1].startswith("give back") is (first > 1)


def test_options_are_given_back_until_the_target_is_near(space):
    def size(candidate):
        return int(space.encode([candidate]).sum())

    slim = Slimming(space, CHANCES, lambda codes: np.asarray(codes).sum(1) / 100 + 1.0)
    steps = [space.decode(s["codes"])[0] for s in slim.path()]
    least = size(steps[4])  # the fifth is the first that is small enough

    def measure(candidate):
        return 0.6 if candidate in steps[:4] else 0.5 + 0.015 * (size(candidate) - least)

    found = met(slim, lambda c: c, 0.55, measure)
    assert found["share"] == pytest.approx(0.53)
    assert [a.startswith("give back") for a in found["actions"][-3:]] == [False, True, True]
    assert size(found["candidate"]) == least + 2


@pytest.mark.parametrize(
    ("latency", "accuracy", "holds"),
    [(0.48, 0.6, True), (0.51, 0.6, False), (0.44, 0.6, False), (0.48, 0.5, False)],
)
def test_efficientformer_check_can_fail(latency, accuracy, holds):
    rows = {
        "slimmed": {"accuracy": accuracy, "latency": latency},
        "uniform": {"accuracy": 0.5, "latency": 0.48},
    }
    assert efficientformer.checked(rows, 0.5)["holds"] is holds


def test_a_block_without_an_operator_gives_its_input_back():
    torch.manual_seed(0)
    net = MetaPath((1, 8, 8), 4, widths=[4, 8, 8], heads=1).eval()
    none = dict.fromkeys(net.space.names, IDENTITY)
    net.activate(net.space.candidate(none))
    x = torch.randn(2, 1, 8, 8)
    by_hand = net.head(net.pool(net.reduce2(net.reduce1(net.stem(x)))))
    torch.testing.assert_close(net(x), by_hand)
    torch.testing.assert_close(net.extract()(x), by_hand)


# --- Fast Sparse ConvNets -----------------------------------------------------------------------------


def test_every_kernel_computes_the_product():
    rng = np.random.default_rng(0)
    weight = fast_sparse_conv.pruned((16, 12, 20), 0.7, 4, rng)
    weight[4:8, np.flatnonzero(weight[4])[0]] = 0  # a block that reads fewer inputs than others
    x = rng.standard_normal((12, 20)).astype(np.float32)
    expected = np.einsum("oi,ip->op", weight.astype(float), x.astype(float))
    for name, make in KERNELS.items():
        np.testing.assert_allclose(make(weight, 4)(x), expected, atol=1e-5, err_msg=name)


def test_a_mask_keeps_the_strongest_inputs_of_each_block():
    weight = torch.ones(4, 3, 1, 1)
    weight[:2, 1] = 2.0
    weight[2:, 2] = -3.0
    mask = block_mask(weight, 1 / 3, 2)[:, :, 0, 0]
    assert mask.tolist() == [[0, 1, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]]


def test_pruning_follows_the_cubic():
    torch.manual_seed(0)
    layer = Gradual(20, 8, 0.8, (10, 50))
    x, zeros = torch.randn(1, 20, 2, 2), []
    for _ in range(60):
        layer(x)
        zeros.append(1 - float(layer.mask.mean()))
    assert zeros[9] == 0
    assert zeros[30] == pytest.approx(0.8 * (1 - 0.5**3))
    assert zeros[50] == zeros[-1] == pytest.approx(0.8)
    assert sorted(zeros) == zeros
    layer.eval()(x)
    assert int(layer.steps) == 60  # no step of training


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_engine_computes_what_the_network_does(kernel):
    torch.manual_seed(0)
    net = network(3, 5, (8, 16), 2, 0.5, (0, 1))
    for _ in range(3):
        net(torch.randn(4, 3, 8, 8))  # moves the norms' statistics, and prunes
    net.eval()
    x = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(Engine(net, kernel)(x), net(x), atol=1e-5, rtol=1e-4)
    assert fast_sparse_conv.shapes_of(net, 8) == [(8, 8, 64), (16, 8, 16), (16, 16, 16)]


def test_fast_sparse_conv_runs():
    found = recipes.run("fast-sparse-conv")
    assert json.loads(json.dumps(found)) == found
    assert found["sparse_wide"]["sparsity"] == pytest.approx(0.75)
    assert found["sparse_wide"]["kernel"] in fast_sparse_conv.SPARSE


@pytest.mark.parametrize(
    ("faster", "sparsity", "accuracy", "holds"),
    [
        (1.2, 0.9, 0.6, True),
        (0.9, 0.9, 0.6, False),  # no kernel pays
        (1.2, 0.7, 0.6, False),  # nothing was timed at 85%
        (1.2, 0.9, 0.5, False),  # the narrow one is as good
    ],
)
def test_fast_sparse_conv_check_can_fail(faster, sparsity, accuracy, holds):
    shape = {"outputs": 8, "inputs": 8, "pixels": 4}
    row = {**shape, "sparsity": sparsity, "times_faster": {"rows": 0.5, "blocks": faster}}
    other = {**shape, "outputs": 9, "sparsity": 0.9, "times_faster": {"rows": 0.1}}
    check = fast_sparse_conv.checked(
        [row, other], [(8, 8, 4)], {"accuracy": accuracy}, {"accuracy": 0.5}
    )
    assert check["holds"] is holds
    assert other in check["slower_at"]


# --- the benchmark beside peers, and its models ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models():
    path = Path(__file__).parents[1] / "benchmarks" / "models.py"
    spec = importlib.util.spec_from_file_location("benchmark_models", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_both_shortcuts_compute_the_same(models, tmp_path):
    torch.manual_seed(0)
    pad = models.ResNet(1, shortcut="pad").eval()
    state = {k: v.numpy() for k, v in pad.state_dict().items() if "tracked" not in k}
    np.savez(tmp_path / "weights.npz", **state)
    conv = models.load(models.ResNet(1), tmp_path / "weights.npz")
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(conv(x), pad(x))
    assert models.mobilenet()(torch.randn(2, 3, 16, 16)).shape == (2, 10)
    state.pop("linear.bias")
    np.savez(tmp_path / "less.npz", **state, odd=state["linear.weight"])
    with pytest.raises(KeyError, match=r"less\.npz and the network differ in linear\.bias, odd"):
        models.load(models.ResNet(1), tmp_path / "less.npz")


@pytest.fixture(scope="module")
def shrinkers():
    folder = str(Path(__file__).parents[1] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("shrinkers")
    finally:
        sys.path.remove(folder)


def test_a_network_is_made_again_from_the_shapes_of_its_weights(shrinkers, models):
    torch.manual_seed(0)
    narrow = models.MobileNet((8, 12, 20), expand=3).eval()
    again = shrinkers.shaped(models.mobilenet(), narrow.state_dict())
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(again(x), narrow(x))


def test_a_method_is_asked_for_less_until_each_share_is_kept(shrinkers):
    asked = []

    class Toy(shrinkers.Method):
        step = 0.5

        def at(self, amount):
            asked.append(amount)
            return nn.Linear(round(64 * amount), 1)

    class Fake:
        def ratio(self, network):
            return network.in_features / 64

    found = Toy(Fake()).cuts([0.1, 0.5, 0.45])
    assert {share: cut.ratio for share, cut in found.items()} == {0.5: 0.5, 0.45: 0.25, 0.1: 0.0625}
    assert asked == [0.5, 0.25, 0.125, 0.0625]  # and no further
    assert found[0.5].network is not found[0.45].network


@pytest.mark.data
@pytest.mark.parametrize("name", ["resnet20", "resnet56"])
def test_the_weights_know_the_images_they_were_trained_on(models, real_data, name):
    with np.load(real_data / "cifar10" / "cifar10_train_first4000_lossless.npz") as data:
        pixels, labels = data["x"][:200], data["y"][:200]
    mean, std = (
        torch.tensor(v)[:, None, None] for v in (models.IMAGENET_MEAN, models.IMAGENET_STD)
    )
    x = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - mean) / std
    net = models.load(models.MODELS[name](), real_data / "weights" / models.WEIGHTS[name])
    with torch.inference_mode():
        right = net(x).argmax(1).numpy() == labels
    assert right.mean() > 0.99
