"""Small transformers and the task of text: conformance, causality, what is disjoint, the recipes."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from espalier import recipes, tasks
from espalier.errors import DataError, SpaceError
from espalier.estimators.zero_cost import ZeroCost
from espalier.nets.gpt import GPT
from espalier.nets.vit import ViT
from espalier.recipes import as_vit, w_pca
from espalier.tasks.text import text
from espalier.testing import check_family
from espalier.testing.estimator import check_estimator
from espalier.testing.task import check_task
from espalier.train.adamw import fit_adamw
from espalier.train.evaluate import evaluate


@pytest.mark.parametrize(
    "family", [GPT((12,), 12 * 256), ViT(), ViT((3, 12, 12), 4, stride=(2, 3), kernel=(3, 5))]
)
def test_families_conform(family):
    check_family(family)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(SpaceError, match="256 classes a place"):
        GPT((12,), 10)
    with pytest.raises(SpaceError, match="strides that divide"):
        ViT((1, 9, 8))


def test_a_decoder_sees_only_what_came_before():
    family = GPT((12,), 12 * 256)
    network = family.build(family.space.decode(family.space.corner(True))[0]).eval()
    one = torch.arange(12.0)[None]
    other = one.clone()
    other[0, 7] = 200
    with torch.no_grad():
        a, b = (network(x).reshape(12, 256) for x in (one, other))
    assert torch.allclose(a[:7], b[:7], atol=1e-5)
    assert all(not torch.allclose(x, y, atol=1e-4) for x, y in zip(a[7:], b[7:], strict=True))


def test_parameters_of_a_transformer_in_closed_form():
    family = ViT((1, 8, 8), 10)
    chosen = {"kernel": 3, "stride": 2, "depth": 2, "width": 16, "ratio": 2, "heads": 4}
    network = family.build(family.space.candidate(chosen))
    block = 4 * (16 * 16 + 16) + (16 * 32 + 32) + (32 * 16 + 16) + 2 * 2 * 16
    outside = 9 * 16 + 16 + 16 * 16 + 2 * 16 + 16 * 10 + 10
    assert sum(p.numel() for p in network.parameters()) == 2 * block + outside


def test_text_is_a_task():
    task = text(context=16, train=300, validation=60, test=60)
    check_task(task)
    x, y = next(iter(task.batches("train", 4)))
    assert torch.equal(x[:, 1:].long(), y[:, :-1])
    uniform = task.measure(torch.zeros(4, 16 * 256), y)
    assert uniform["bits_per_byte"] == pytest.approx(8.0, abs=1e-5)
    assert text(context=16, train=300, seed=1).fingerprint != task.fingerprint


def test_no_byte_of_a_text_is_in_two_splits():
    raw = np.arange(40 * 4096, dtype=np.uint32).view(np.uint8)[: 40 * 4096 * 2].tobytes()
    task = text(raw, context=15, train=200, validation=40, test=40)
    seen = {s: {r.numpy().tobytes() for r in task._splits[s][0]} for s in task._splits}
    assert not seen["train"] & seen["validation"]
    assert not seen["train"] & seen["test"]
    assert not seen["validation"] & seen["test"]


def test_text_that_is_missing_or_short_is_refused(tmp_path):
    with pytest.raises(DataError, match="no file"):
        text(tmp_path / "absent.txt")
    with pytest.raises(DataError, match="ask for fewer"):
        text(b"too short" * 1000)


def test_adamw_learns_and_repeats():
    task = text(context=16, train=400, validation=60, test=60)
    family = GPT(task.shape, task.classes)
    chosen = {"depth": 1, "width": 32, "ratio": 2, "heads": 2}

    def trained(**part):
        torch.manual_seed(0)
        network = family.build(family.space.candidate(chosen))
        before = [p.clone() for p in network.parameters()]
        fit_adamw(network, task, part.pop("steps", 60), seed=1, **part)
        moved = sum(
            float((a - b).detach().abs().sum())
            for a, b in zip(network.parameters(), before, strict=True)
        )
        return network, moved

    (one, _), (two, _) = trained(), trained(of=60)
    _, early = trained(steps=2, after=10, of=60)
    _, late = trained(steps=2, after=58, of=60)
    assert late < early / 10, "a part of a longer training has its rates"
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert evaluate(one, task, "validation")["bits_per_byte"] < 6.0


def test_zero_cost_of_decoders_conforms():
    task = text(context=16, train=100, validation=60, test=60)
    family = GPT(task.shape, task.classes, depth=(1, 2), width=(8, 16))
    codes = family.space.sample(3, np.random.default_rng(0))
    candidates = list(family.space.decode(codes[family.space.unique(codes)]))
    names = ("snip", "grad_norm", "grasp", "fisher", "synflow", "l2", "zico", "w_pca", "params")
    check_estimator(ZeroCost(family, task, names, batch=8), candidates)


def test_complexities_of_transformers_conform():
    task = tasks.make("digits:train=80,validation=40,test=40")
    family = ViT(task.shape, task.classes)
    codes = family.space.sample(3, np.random.default_rng(0))
    candidates = list(family.space.decode(codes[family.space.unique(codes)]))
    names = ("ntk_condition", "length_distortion", "w_pca", "jacob_cov", "synflow")
    check_estimator(ZeroCost(family, task, names, batch=8), candidates)


def test_finer_tokens_keep_the_weights():
    family = ViT(kernel=(4,), stride=(2, 4), depth=(1,), width=(8,))
    options = {"kernel": 4, "depth": 1, "width": 8, "ratio": 2, "heads": 1}
    coarse, fine = (family.build(family.space.candidate({**options, "stride": s})) for s in (4, 2))
    made = as_vit.finer(coarse, fine)
    with torch.no_grad():
        coarse.body.position.weight.fill_(0.25)
    made = as_vit.finer(coarse, fine)
    assert made.body.position.weight.shape == (16, 8)
    assert torch.allclose(made.body.position.weight, torch.tensor(0.25))
    assert torch.equal(made.patch.weight, coarse.patch.weight)


def test_the_check_of_w_pca_counts_halves():
    rows = [
        {
            "bits_per_byte": 5 - 0.1 * i,
            "seconds": 1.0,
            "scores": {"w_pca": i, "snip": -i, "params": i % 7},
            "ms": {"w_pca": 1.0, "snip": 6.0, "params": 0.1},
        }
        for i in range(20)
    ]
    found = w_pca.check(rows, 0)
    assert found["tau"]["w_pca"] == pytest.approx(1.0)
    assert found["tau"]["snip"] == pytest.approx(-1.0)
    assert found["halves_ahead_of_both"] == 5
    assert found["holds"]
    for row in rows:
        row["ms"]["w_pca"] = 3.0
    assert not w_pca.check(rows, 0)["holds"]


def test_chance_at_equal_cost_keeps_what_cost_explains():
    rng = np.random.default_rng(0)
    macs = np.arange(64.0)
    rows = [
        {"length_distortion": m + rng.normal(), "ntk_condition": 0.0, "params": m, "macs": m}
        for m in macs
    ]
    for row in rows:
        row["accuracy"] = row["macs"] / 64  # explained by cost alone
    found = as_vit._ranking_check(rows, 0)
    assert found["tau"]["length_distortion"] > 0.8
    assert found["chance_at_equal_macs_95"] > 0.8, "shuffling within bins keeps what cost explains"


@pytest.mark.parametrize("name", ["w-pca", "as-vit"])
def test_recipes_run_and_go_on(name, tmp_path, monkeypatch):
    monkeypatch.setattr(w_pca, "_SCALES", {"smoke": (6, 3)})
    monkeypatch.setattr(as_vit, "_SCALES", {"smoke": (3, 3, (1500,), 1, 1)})
    first = recipes.run(name, "smoke", 0, tmp_path)
    assert isinstance(first["check"]["holds"], bool)
    again = recipes.run(name, "smoke", 0, tmp_path)
    assert json.dumps(again) == json.dumps(first), "what is kept is not run again"
    assert all(math.isfinite(v) for v in first["check"]["tau"].values())
