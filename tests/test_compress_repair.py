"""Repair of cut models: closed-form refits against numpy, fine-tuning that resumes and stops."""

from __future__ import annotations

import copy
import json
import math
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from espalier import tasks, train
from espalier.compress.ranges import calibrate
from espalier.compress.repair import (
    finetune,
    least_squares,
    patches,
    recalibrate,
    reconstruct,
    tuning,
)
from espalier.compress.repair.distil import Teaching, distance
from espalier.compress.repair.kept import kept_rows
from espalier.compress.repair.least_squares import Moments, refit
from espalier.errors import EspalierError, StudyError
from espalier.export.quantisers import quantised
from espalier.problem import Metric
from espalier.train import Recipe
from espalier.train.losses import by_label, hard, soft


@pytest.fixture(scope="module")
def few():
    return tasks.make("digits:train=200,validation=100,test=50")


class Net(nn.Module):
    """Two convolutions with a batch norm between them, a depthwise one and a linear layer."""

    def __init__(self, hidden: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, hidden, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(hidden)
        self.second = nn.Conv2d(hidden, 6, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(6 * 16, 10)

    def forward(self, x):
        x = self.second(functional.relu(self.norm(self.first(x))))
        return self.head(self.drop(functional.relu(self.depthwise(x))).flatten(1))


def made(seed: int = 0, **settings) -> Net:
    torch.manual_seed(seed)
    return Net(**settings).eval()


def cut(net: Net, rows: torch.Tensor) -> Net:
    """The network with some of its hidden channels."""
    small = Net(len(rows)).eval()
    state = copy.deepcopy(net.state_dict())
    for name in ("weight", "bias", "running_mean", "running_var"):
        state[f"norm.{name}"] = state[f"norm.{name}"][rows]
    state["first.weight"] = state["first.weight"][rows]
    state["second.weight"] = state["second.weight"][:, rows]
    small.load_state_dict(state)
    return small


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


# Least squares


def test_a_refit_is_what_numpy_finds() -> None:
    rng = np.random.default_rng(0)
    x, y, start = rng.normal(size=(50, 6)), rng.normal(size=(50, 3)), rng.normal(size=(3, 6))
    moments = Moments.empty(6, 3).add(torch.tensor(x[:20]), torch.tensor(y[:20]))
    moments.add(torch.tensor(x[20:]), torch.tensor(y[20:]))
    expected = np.linalg.lstsq(x, y, rcond=None)[0].T
    assert np.allclose(refit(moments, torch.tensor(start), 0.0), expected)
    # a ridge around the start is as many more rows that ask for the start
    ridge = np.sqrt(0.3 * np.mean(np.diag(x.T @ x)))
    tall = np.vstack([x, ridge * np.eye(6)])
    expected = np.linalg.lstsq(tall, np.vstack([y, ridge * start.T]), rcond=None)[0].T
    found = refit(moments, torch.tensor(start), 0.3)
    assert np.allclose(found, expected)
    error = ((y - x @ expected.T) ** 2).sum() / (y**2).sum()
    assert moments.error(found) == pytest.approx(error)


def test_a_masked_refit_is_one_numpy_problem_a_row(monkeypatch) -> None:
    rng = np.random.default_rng(1)
    x, y, start = rng.normal(size=(50, 6)), rng.normal(size=(50, 4)), rng.normal(size=(4, 6))
    mask = rng.random((4, 6)) < 0.6
    mask[2] = True  # a row without zeros is solved as the layer's others would be
    monkeypatch.setattr(least_squares, "_ROWS", 7)  # examples are taken in by parts
    moments = Moments.empty(6, 4).add(torch.tensor(x), torch.tensor(y))
    assert (moments.rows, moments.gram.numpy()) == (50, pytest.approx(x.T @ x))
    alone = []
    solve = least_squares._masked
    monkeypatch.setattr(least_squares, "_masked", lambda *a: alone.append(len(a[1])) or solve(*a))
    found = refit(moments, torch.tensor(start), 0.0, torch.tensor(mask)).numpy()
    assert sum(alone) == 3
    for row in range(4):
        held = y[:, row] - x[:, ~mask[row]] @ start[row, ~mask[row]]
        expected = np.linalg.lstsq(x[:, mask[row]], held, rcond=None)[0]
        assert np.allclose(found[row, mask[row]], expected)
    assert np.array_equal(found[~mask], start[~mask])


LAYERS = {
    "plain": (nn.Conv2d(4, 6, 3, padding=1), (3, 4, 7, 5)),
    "strided, dilated": (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=2, dilation=2), (3, 4, 9, 8)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, bias=False), (3, 4, 7, 7)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4), (3, 4, 7, 7)),
    "same, reflected": (nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"), (3, 4, 7, 7)),
    "one dimension": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (3, 4, 9)),
    "one dimension, circular": (nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), (3, 4, 9)),
    "linear": (nn.Linear(4, 6), (3, 4)),
    "linear on tokens": (nn.Linear(4, 6, bias=False), (3, 5, 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_rows_times_weights_are_the_layer(name) -> None:
    layer, shape = LAYERS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = layer(x)
        places = patches.Places.of(layer, out, 12, torch.Generator().manual_seed(1))
        read, gives = patches.inputs(layer, x, places), patches.outputs(layer, out, places)
        parts = layer.weight.flatten(1).chunk(read.shape[1])
        found = torch.cat([read[:, g] @ w.T for g, w in enumerate(parts)], dim=1)
        found = found if layer.bias is None else found + layer.bias
    assert len(gives) >= 3
    assert torch.allclose(found, gives, atol=1e-5)


# Which rows were kept


def test_kept_rows_are_found_by_their_weights() -> None:
    whole = torch.randn(12, 5, 3, generator=torch.Generator().manual_seed(0))
    whole[4] = 0
    rows = torch.tensor([0, 3, 4, 7, 11])
    smaller = whole[rows][:, [1, 2, 4]].clone()
    smaller[1, :2] = 0  # and sparse
    found = kept_rows(smaller, whole)
    assert found is not None
    assert torch.equal(found, rows)
    assert kept_rows(torch.randn(3, 5, 3), whole) is None
    twins = torch.cat([whole, whole])
    assert kept_rows(smaller, twins) is None  # two rows are alike: it can't be told


# Reconstruction


def inputs(n: int = 64, seed: int = 3) -> torch.Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_redundant_channels_are_made_up_for_exactly() -> None:
    net = made()
    with torch.no_grad():  # channels 4.. are copies of 0..: what they did, the first can do
        for name in ("first.weight", "norm.weight", "norm.bias"):
            tensor = dict(net.named_parameters())[name]
            tensor[4:] = tensor[:4]
        net.norm.weight.mul_(torch.arange(8) % 4 + 1.0)  # rows can be told apart all the same
    small = cut(net, torch.arange(4))
    twin = copy.deepcopy(small)
    x = inputs()
    rows = {"first": torch.arange(4)}
    told = reconstruct(small, net, x, ridge=1e-9, kept=rows)
    assert told["output"]["before"] > 0.01
    assert told["output"]["after"] < 1e-9
    assert not told["undone"]
    assert json.loads(json.dumps(told)) == told
    fresh = inputs(seed=4)
    assert torch.allclose(small(fresh), net(fresh), atol=1e-3)
    # without the rows given, the first layer can't be told apart and is left alone
    told = reconstruct(twin, net, x, ridge=1e-9)
    assert [s["layer"] for s in told["skipped"]] == ["first"]


def test_a_refit_of_a_layer_is_the_least_squares_of_unfolded_inputs() -> None:
    net = made()
    rows = torch.tensor([0, 2, 5])
    small = cut(net, rows)
    before = copy.deepcopy(small)
    x = inputs()
    told = reconstruct(small, net, x, ridge=0.0)
    with torch.no_grad():
        read = functional.relu(before.norm(before.first(x)))
        columns = functional.unfold(read, 3, padding=1, stride=2).transpose(1, 2).reshape(-1, 27)
        columns = torch.cat([columns, torch.ones(len(columns), 1)], dim=1).double().numpy()
        wanted = net.second(functional.relu(net.norm(net.first(x))))
        wanted = wanted.flatten(2).transpose(1, 2).reshape(-1, 6).double().numpy()
    expected = np.linalg.lstsq(columns, wanted, rcond=None)[0].T
    found = torch.cat([small.second.weight.flatten(1), small.second.bias[:, None]], dim=1)
    assert np.allclose(found.detach().numpy(), expected, atol=1e-4)
    layer = next(r for r in told["layers"] if r["layer"] == "second")
    error = ((wanted - columns @ expected.T) ** 2).sum() / (wanted**2).sum()
    assert layer["after"] == pytest.approx(error, rel=1e-3)
    assert layer["after"] < layer["before"]
    assert [r["layer"] for r in told["layers"]] == ["first", "second", "depthwise", "head"]


def test_statistics_set_anew_do_not_spoil_it(few) -> None:
    net = made()
    for tensor in (net.norm.weight, net.norm.bias, net.norm.running_mean, net.norm.running_var):
        tensor.data.uniform_(0.5, 2)
    small = cut(net, torch.tensor([1, 4, 6]))
    again = copy.deepcopy(small)
    recalibrate(again, few, batches=1)
    assert not torch.equal(again.norm.running_mean, small.norm.running_mean)
    x = next(iter(few.batches("train", 64)))[0]
    for each in (small, again):
        reconstruct(each, net, x)
    assert same(small, again)


def test_zeros_stay_and_the_rest_makes_up_for_them() -> None:
    net = made()
    sparse = copy.deepcopy(net)
    mask = torch.rand(sparse.second.weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    sparse.second.weight.data *= mask
    told = reconstruct(sparse, net, inputs())
    assert not (sparse.second.weight[~mask] != 0).any()
    layer = next(r for r in told["layers"] if r["layer"] == "second")
    assert layer["after"] < 0.8 * layer["before"]


def test_quantised_layers_are_refitted_and_rounded_anew() -> None:
    net = made()
    rows = torch.tensor([0, 2, 5, 6])
    plain, rounded = cut(net, rows), cut(net, rows)
    x = inputs()
    rounded.second = quantised(rounded.second, 3)
    calibrate(rounded, x)
    low = copy.deepcopy(rounded.second.input_quantiser.state_dict())
    told = [reconstruct(model, net, x) for model in (plain, rounded)]
    assert [r["layer"] for r in told[1]["layers"]] == [r["layer"] for r in told[0]["layers"]]
    assert torch.equal(rounded.second.weight, plain.second.weight)  # all before it are alike
    # the depthwise layer after it sees what it gives when rounded
    assert not torch.equal(rounded.depthwise.weight, plain.depthwise.weight)
    with torch.no_grad():
        values, scales = rounded.second.rounded_weight(), rounded.second.scales()
        levels = values / scales[:, None, None, None]
        lost = (
            values - rounded.second.weight
        ).square().sum() / rounded.second.weight.square().sum()
    assert torch.allclose(levels, levels.round(), atol=1e-4)
    assert float(levels.abs().max()) == pytest.approx(3)
    assert float(lost) < 0.2
    assert rounded.second.input_quantiser.look is None
    assert all(
        torch.equal(v, low[k]) for k, v in rounded.second.input_quantiser.state_dict().items()
    )
    calibrate(rounded, x)
    with torch.no_grad():
        error = float((rounded(x) - net(x)).square().sum() / net(x).square().sum())
    assert error < 0.5 * told[1]["output"]["before"]


def test_a_reconstruction_never_ends_worse(monkeypatch) -> None:

    net = made()
    small = cut(net, torch.tensor([0, 1, 2, 3, 4]))
    stored = copy.deepcopy(small)

    def spoil(layer, *_):
        layer.weight.data *= 3
        return 0.0, 0.0

    module = "espalier.compress.repair.reconstruct"  # a function of the same name hides it
    monkeypatch.setattr(sys.modules[module], "refit_layer", spoil)
    told = reconstruct(small, net, inputs())
    assert told["undone"]
    assert told["output"]["after"] == told["output"]["before"]
    assert same(small, stored)


def test_what_can_not_be_refitted_is_said() -> None:
    net = made()
    shared = copy.deepcopy(net)
    shared.head = nn.Sequential(nn.Linear(96, 10))
    told = reconstruct(shared, net, inputs())
    assert {s["layer"]: s["reason"] for s in told["skipped"]} == {
        "head.0": "the original has no Linear of this name"
    }
    attention = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)).eval()
    told = reconstruct(attention, copy.deepcopy(attention), torch.randn(4, 3, 4))
    assert told["skipped"][0]["reason"].startswith("a NonDynamicallyQuantizableLinear: only Linear")
    shared.head = nn.Linear(96, 7)
    with pytest.raises(EspalierError, match="outputs of one shape"):
        reconstruct(shared, net, inputs())
    with pytest.raises(EspalierError, match="2 or more examples, got 1"):
        reconstruct(net, net, inputs(1))


# Distillation


def test_the_distance_is_the_softened_divergence() -> None:
    ours, theirs = torch.randn(2, 5, 4, dtype=torch.float64)
    labels = torch.zeros(5, dtype=torch.long)
    p, q = (torch.softmax(t / 3, 1).numpy() for t in (theirs, ours))
    expected = 9 * (p * (np.log(p) - np.log(q))).sum(1).mean()
    assert float(distance(ours, theirs, labels, 3.0)) == pytest.approx(expected)
    values = torch.zeros(5, 4)
    assert float(distance(ours, theirs, values, 3.0)) == pytest.approx(
        float((ours - theirs).square().mean())
    )


@pytest.mark.parametrize(
    ("shape", "places"),
    [((2, 4), ()), ((2, 4, 3), (3,)), ((2, 3, 4), (3,)), ((2, 12), (3,)), ((2, 4, 3, 5), (3, 5))],
)
def test_logits_are_found_in_every_layout(shape, places) -> None:
    kinds, labels = 4, torch.zeros(2, *places, dtype=torch.long)
    out = torch.randn(shape)
    found = by_label(out, labels)
    assert found.shape == (labels.numel(), kinds)
    middle = places and shape[1:] == (kinds, *places)
    one = out[0][(slice(None), *(0 for _ in places))] if middle else out[0].reshape(-1)[:kinds]
    assert torch.equal(found[0], one)


@pytest.mark.parametrize("shape", [(2, 4, 3), (2, 3, 4), (2, 12)])
def test_losses_of_several_labels_are_those_of_each(shape) -> None:
    ours, theirs = torch.randn(2, *shape)
    labels = torch.randint(4, (2, 3))
    rows, wanted = by_label(ours, labels), by_label(theirs, labels)
    assert soft(ours, theirs, labels) == soft(rows, wanted, labels.flatten())
    told = SimpleNamespace(loss=lambda outputs, targets: torch.tensor(0.0), name="told")
    assert hard(told, ours, labels, 0.5) == hard(told, rows, labels.flatten(), 0.5) > 0


def test_targets_that_are_no_class_numbers_leave_a_distance() -> None:
    """Marks for each class, one number for yes and no, answers of another count than the outputs."""
    ours, theirs = torch.randn(2, 6, 4, dtype=torch.float64)
    marks, twice = torch.ones(6, 4, dtype=torch.long), torch.ones(6, 5, dtype=torch.long)
    plain = distance(ours, theirs, torch.zeros(6, dtype=torch.long), 1.0)
    assert distance(ours, theirs, marks, 1.0) == plain > 0
    assert distance(ours, theirs, twice, 1.0) == plain
    one, other = ours[:, :1], theirs[:, :1]
    yes = torch.ones(6, dtype=torch.long)
    assert distance(one, other, yes, 1.0) == pytest.approx(float((one - other).square().mean()))


# Fine-tuning

QUICK = Recipe(epochs=3, batch=50, lr=0.05, precision="fp32")


@pytest.fixture(scope="module")
def original(few):
    net = made(16)
    train.fit(net, few, Recipe(epochs=12, precision="fp32"), 0)
    return net


class Stop(Exception):
    pass


def stop_after(epochs):
    def progress(done, total, text):
        if done == epochs:
            raise Stop

    return progress


def test_fine_tuning_brings_accuracy_back(few, original) -> None:
    small = cut(original, torch.tensor([0, 3, 5]))
    told = finetune(small, original, few, Recipe(epochs=8, batch=50, lr=0.05))
    assert told["after"]["accuracy"] > told["before"]["accuracy"] + 0.05
    assert train.evaluate(small, few, "validation") == told["after"]
    best = max(told["history"], key=lambda row: row["accuracy"])
    assert told["best_epoch"] == best["epoch"]
    assert told["stopped"] == "epochs"
    assert [row["steps"] for row in told["history"]] == [4] * 8
    assert told["history"][-1]["lr"] < told["history"][2]["lr"] / 5
    assert json.loads(json.dumps(told)) == told
    assert not small.training


def test_learning_without_labels_nears_the_original(few, original) -> None:
    small = cut(original, torch.tensor([0, 3, 5]))
    x, y = next(iter(few.batches("validation", 100)))
    with torch.no_grad():
        wanted = original(x)
        before = float(distance(small(x), wanted, y, 1.0))
    finetune(small, original, few, Recipe(epochs=6, batch=50, lr=0.05), share_of_labels=0.0)
    with torch.no_grad():
        assert float(distance(small(x), wanted, y, 1.0)) < 0.8 * before


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_a_stopped_fine_tuning_resumes_to_the_same_bits(few, original, tmp_path, optimiser) -> None:
    rows = torch.tensor([0, 3, 5])
    whole, parts, fresh = (cut(original, rows) for _ in range(3))
    for each in (whole, parts, fresh):
        each.drop.p = 0.2
    lr = {"sgd": 0.05, "adamw": 1e-3}[optimiser]
    recipe = Recipe(epochs=4, batch=50, lr=lr, precision="fp32")
    settings = {"optimiser": optimiser, "seed": 5}
    expected = finetune(whole, original, few, recipe, **settings)
    path = tmp_path / "partial"
    with pytest.raises(Stop):
        finetune(parts, original, few, recipe, checkpoint=path, progress=stop_after(2), **settings)
    seen: list[int] = []
    told = finetune(
        fresh, original, few, recipe, checkpoint=path, progress=lambda d, *_: seen.append(d), **settings
    )  # fmt: skip
    assert seen == [3, 4]
    for result in (told, expected):
        result.pop("seconds")
    assert told == expected
    assert same(fresh, whole)
    other = cut(original, rows)
    other.drop.p = 0.2
    assert finetune(other, original, few, recipe, checkpoint=path, **settings)["history"]
    assert same(other, whole)  # finished: read, not repeated
    with pytest.raises(StudyError, match="seed was 5, is 6"):
        finetune(other, original, few, recipe, checkpoint=path, optimiser=optimiser, seed=6)


def test_time_ends_it_with_the_rate_at_nothing(few, original) -> None:
    clock = [0.0]

    def now() -> float:
        clock[0] += 0.01
        return clock[0]

    small = cut(original, torch.tensor([0, 3, 5]))
    recipe = Recipe(epochs=1000, batch=50, lr=0.05)
    told = finetune(small, original, few, recipe, seconds=2.0, clock=now)
    assert told["stopped"] == "time"
    assert 1.5 < told["seconds"] <= 2.05  # the clock ticks at each look
    ran = [row for row in told["history"] if row["steps"]]
    assert 3 < len(ran) < 100
    assert ran[-1]["lr"] < 0.005


def test_the_last_steps_are_validated_wherever_time_ends(few, original, monkeypatch) -> None:
    clock = [0.0]

    def now() -> float:
        clock[0] += 0.01
        return clock[0]

    def slow(*args):
        clock[0] += 0.2  # so that not every epoch is validated
        return train.evaluate(*args)

    monkeypatch.setattr(tuning, "evaluate", slow)
    begun = 0  # epochs that end before their first step
    for limit in range(20):
        clock[0] = 0.0
        small = cut(original, torch.tensor([0, 3, 5]))
        recipe = Recipe(epochs=1000, batch=100, lr=0.05)
        told = finetune(small, original, few, recipe, seconds=1.5 + limit / 100, clock=now)
        assert told["stopped"] == "time"
        rows = told["history"]
        last = max(i for i, row in enumerate(rows) if row["steps"])
        assert any("accuracy" in row for row in rows[last:])
        begun += last < len(rows) - 1
    assert begun


@pytest.mark.parametrize("seconds", [None, 60.0])
def test_a_metric_may_have_the_name_of_the_loss(few, original, seconds) -> None:
    by_loss = copy.copy(few)
    by_loss.metrics = (Metric("loss", "nats", "min", "measured"),)
    by_loss.measure = lambda out, labels: {"loss": float(functional.cross_entropy(out, labels))}
    small = cut(original, torch.tensor([0, 3, 5]))
    told = finetune(small, original, by_loss, QUICK, seconds=seconds)
    assert told["after"]["loss"] < told["before"]["loss"]
    assert told["best_epoch"] > 0


def test_what_came_before_a_divergence_is_validated(few, original, monkeypatch) -> None:
    losses, clock = iter([0.0] * 5 + [math.nan]), [0.0]
    teach = Teaching.loss

    def breaks(self, *args):
        clock[0] += 0.01
        return teach(self, *args) + next(losses)

    def slow(*args):
        clock[0] += 1.0  # not every epoch is validated
        return train.evaluate(*args)

    monkeypatch.setattr(Teaching, "loss", breaks)
    monkeypatch.setattr(tuning, "evaluate", slow)
    small = cut(original, torch.tensor([0, 3, 5]))
    recipe = Recipe(epochs=1000, batch=100, lr=0.05)
    told = finetune(small, original, few, recipe, seconds=60.0, clock=lambda: clock[0])
    assert told["stopped"] == "diverged"
    assert [row["steps"] for row in told["history"]] == [2, 2, 1]
    assert ["accuracy" in row for row in told["history"]] == [False, False, True]


def test_without_a_recipe_the_time_is_used(few, original, monkeypatch) -> None:
    ticks = iter(range(10**9))
    monkeypatch.setattr(time, "monotonic", lambda: next(ticks) * 0.01)
    small = cut(original, torch.tensor([0, 3, 5]))
    seen: list[tuple[int, int]] = []
    told = finetune(small, original, few, seconds=2.5, progress=lambda d, n, _: seen.append((d, n)))
    assert len(seen) == len(told["history"])
    assert all(0 <= done <= total == 2 for done, total in seen)  # in whole seconds
    assert len(told["history"]) > 10
    assert told["stopped"] in ("time", "patience")


def test_it_waits_for_half_of_the_training_unless_told(few, original) -> None:
    small = copy.deepcopy(original)
    recipe = Recipe(epochs=24, batch=100, lr=1e-9, precision="fp32")
    told = finetune(small, original, few, recipe)  # nothing changes
    assert told["stopped"] == "patience"
    assert len(told["history"]) == 12
    assert len(finetune(small, original, few, recipe, patience=3)["history"]) == 3


def test_no_time_changes_nothing(few, original) -> None:
    small = cut(original, torch.tensor([0, 3, 5]))
    stored = copy.deepcopy(small)
    told = finetune(small, original, few, QUICK, seconds=1e-9)
    assert told["stopped"] == "time"
    assert told["before"] == told["after"]
    assert same(small, stored)


def test_what_does_not_help_is_not_kept(few, original) -> None:
    small = copy.deepcopy(original)
    stored = copy.deepcopy(small)
    told = finetune(small, original, few, Recipe(epochs=9, batch=50, lr=30.0), patience=2)
    assert told["stopped"] in ("patience", "diverged")
    assert len(told["history"]) <= 2
    assert told["best_epoch"] == 0
    assert told["after"] == told["before"]
    assert same(small, stored)


def test_sparse_weights_stay_sparse(few, original) -> None:
    sparse = copy.deepcopy(original)
    mask = torch.rand(sparse.second.weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    sparse.second.weight.data *= mask
    sparse.head.weight.data[0, 0] = 0  # one zero by chance is not a sparse layer
    finetune(sparse, original, few, QUICK)
    assert not (sparse.second.weight[~mask] != 0).any()
    assert (sparse.second.weight[mask] != 0).all()


def test_numbers_out_of_range_are_refused(few, original) -> None:
    for name, value in (("seconds", 0), ("temperature", 0), ("share_of_labels", 1.5), ("patience", 0)):  # fmt: skip
        with pytest.raises(EspalierError, match=f"{name} of a fine-tuning must be .* got {value}"):
            finetune(original, None, few, QUICK, **{name: value})
