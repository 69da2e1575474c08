"""IST: the recipe runs; only chosen layers learn; scores move the right way; memory is counted."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from espalier import recipes
from espalier.recipes import ist
from espalier.recipes._parts.tuning import memory_saved

SETTING = ist._SCALES["smoke"]


@pytest.fixture(scope="module")
def base() -> Any:
    return SETTING.tuning.model(None)


def test_it_runs() -> None:
    found = recipes.run("ist")
    assert json.loads(json.dumps(found)) == found
    assert [found["arms"][a]["layers_a_step"] for a in ist.ARMS] == [4, 1, 1]
    assert any(found["arms"]["importance"]["scores"])
    assert found["arms"]["importance"]["memory"] < found["arms"]["all"]["memory"]
    assert found["arms"]["all"]["test_bits"] < found["untuned_bits"]


def test_only_the_layers_of_the_step_learn(base: Any) -> None:
    task = SETTING.tuning.task("rot13", 0)
    tuned = ist.Tuned(base, task, SETTING, "random", 0)
    before = {n: p.clone() for n, p in tuned.model.named_parameters()}
    drawn = []
    tuned._chosen = lambda rng: drawn.append(2) or [2]  # type: ignore[assignment,func-returns-value]
    tuned.run()
    moved = {n for n, p in tuned.model.named_parameters() if not torch.equal(p, before[n])}
    assert len(drawn) == SETTING.tuning.steps
    assert moved
    assert all(".layers.2." in name and "lora_" in name for name in moved)


def test_suppressing_changes_the_loss_and_is_undone(base: Any) -> None:
    task = SETTING.tuning.task("rot13", 0)
    tuned = ist.Tuned(base, task, replace(SETTING, rate=100.0), "importance", 0)
    with torch.no_grad():
        for p in tuned.model.parameters():
            if p.requires_grad:
                p.add_(0.2)
    x, y = next(task.batches("train", 4))
    before = float(tuned._loss(x, y).detach())
    tuned._score((x, y), np.random.default_rng(0))
    assert tuned.importance.scores.any()
    assert float(tuned._loss(x, y).detach()) == pytest.approx(before, abs=1e-6)


def test_scores_fall_where_suppression_hurts() -> None:
    importance, rng = ist.Importance(6, 10.0), np.random.default_rng(0)
    for _ in range(60):  # layer 4 is the one that matters
        sets = [importance.to_suppress(3, rng) for _ in range(3)]
        importance.learn(sets, [3.0 if 4 in own else 1.0 for own in sets])
    assert importance.scores.argmin() == 4
    drawn = np.concatenate([importance.to_tune(2, rng) for _ in range(200)])
    counts = np.bincount(drawn, minlength=6)
    assert counts.argmax() == 4
    # one update by hand: rewards e^-1 and e^-2, each less their mean, times 1/4 and the rate
    one = ist.Importance(2, 10.0)
    one.learn([[0], [1]], [1.0, 2.0])
    half = (np.exp(-1) - np.exp(-2)) / 2
    assert one.scores == pytest.approx([2.5 * half, -2.5 * half])


def test_memory_counts_each_storage_once_and_not_the_weights() -> None:
    x, w = torch.randn(8, 4), torch.randn(4, 4, requires_grad=True)
    frozen = torch.randn(4, 4)
    # x @ w keeps x and w; the product by frozen weights keeps only those
    assert memory_saved(lambda: ((x @ w) @ frozen).sum(), [w, frozen]) == 8 * 4 * 4
    assert memory_saved(lambda: (x @ w + x @ w).sum(), [w]) == 8 * 4 * 4
