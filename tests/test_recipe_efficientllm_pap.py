"""EfficientLLM: the recipe runs; saliency, sizes and the optimiser's moments are what they should be."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from espalier import recipes
from espalier.compress.language.anatomy import anatomy
from espalier.recipes import efficientllm_pap as pap
from espalier.recipes._parts import groups, language
from espalier.tasks.text import text

SETTING = pap._SCALES["smoke"]


@pytest.fixture(scope="module")
def task() -> Any:
    return text(None, SETTING.context, SETTING.windows, SETTING.held, SETTING.held, 0)


@pytest.fixture
def model() -> Any:
    return language.fresh_model("dense", 0, **SETTING.large)


def test_it_runs() -> None:
    found = recipes.run("efficientllm-pap")
    assert json.loads(json.dumps(found)) == found
    arms = found["arms"]
    small = found["weights"]["small"]
    assert arms["direct"]["weights"] == small
    for arm in ("after", "aware"):
        assert 0.8 * small < arms[arm]["weights"] <= small
    assert len(arms["aware"]["sizes"]) == SETTING.stages
    for row in arms.values():  # all stop within a step of the largest model
        assert 0 <= row["operations"] - found["operations"] <= found["operations"] / SETTING.steps
    assert arms["direct"]["steps"] > arms["aware"]["steps"] > SETTING.steps


def test_saliency_is_the_change_of_the_loss_without_a_group(model: Any, task: Any) -> None:
    x, y = next(task.batches("train", 4))
    ids = x.long()

    def loss(net: Any) -> torch.Tensor:
        logits = net(input_ids=ids).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())

    base = loss(model)
    base.backward()
    found = groups.saliency(model)
    small = 1e-3
    for group, index in ((("units", 1), 5), (("heads", 0), 1), (("hidden", -1), 7)):
        twin = copy.deepcopy(model)
        f, a = twin.model.layers[group[1]].mlp, twin.model.layers[group[1]].self_attn
        each = slice(index * 8, index * 8 + 8)
        if group[0] == "units":
            views = [
                f.gate_proj.weight[index],
                f.up_proj.weight[index],
                f.down_proj.weight[:, index],
            ]
        elif group[0] == "heads":
            both = slice(index * 16, index * 16 + 16)
            views = [a.q_proj.weight[both], a.o_proj.weight[:, both]]
            views += [a.k_proj.weight[each], a.v_proj.weight[each]]
        else:
            views = []
            for name, p in twin.named_parameters():
                last = name.endswith(("o_proj.weight", "down_proj.weight"))
                views.append(p[index] if last or p.dim() == 1 else p[:, index])
        with torch.no_grad():
            for view in views:
                view.mul_(1 - small)
            change = abs(float(loss(twin) - base)) / small
        assert float(found[group][index]) == pytest.approx(change, rel=0.05, abs=2e-3)


def test_what_is_cut_is_cut_from_the_moments_too(model: Any, task: Any) -> None:
    training = pap.Training(model, task, SETTING, 0)
    one = groups.operations(model, SETTING.batch * SETTING.context)
    training.until(2 * one, 40 * one)
    before = {n: p.clone() for n, p in training.mean.named_parameters()}
    parts = anatomy(model)
    found = {g: torch.arange(n).float() for g, n in _sizes(parts).items()}
    kept = groups.chosen(parts, found, 0.5 * groups.weights(model))
    for part in (training.model, training.mean, training.square):
        groups.cut(part, kept, scaled=part is model)
    shapes = {n: p.shape for n, p in model.named_parameters()}
    assert groups.weights(model) <= 0.5 * sum(p.numel() for p in before.values())
    assert shapes == {n: p.shape for n, p in training.mean.named_parameters()}
    name = "model.layers.1.mlp.up_proj.weight"
    rows, columns = kept["units", 1], kept["hidden", -1]
    assert torch.equal(dict(training.mean.named_parameters())[name], before[name][rows][:, columns])
    norm = "model.norm.weight"
    assert torch.equal(dict(training.mean.named_parameters())[norm], before[norm][columns])
    training.until(training.used + one, 40 * one)  # it goes on


def test_the_least_salient_leave_and_sizes_are_counted(model: Any) -> None:
    parts = anatomy(model)
    sizes = _sizes(parts)
    assert groups.counted(parts, sizes) == groups.weights(model)
    found = {g: torch.ones(n) for g, n in sizes.items()}
    found["units", 0][3] = found["units", 0][9] = 0.0
    less = groups.counted(parts, {**sizes, ("units", 0): sizes["units", 0] - 2})
    kept = groups.chosen(parts, found, less)
    assert {g: len(k) for g, k in kept.items()} == {**sizes, ("units", 0): sizes["units", 0] - 2}
    assert not {3, 9} & set(kept["units", 0].tolist())


def test_our_steps_are_those_of_adamw(model: Any, task: Any) -> None:
    twin = copy.deepcopy(model)
    training = pap.Training(model, task, SETTING, 0)
    optimiser = torch.optim.AdamW(twin.parameters(), lr=1e-3, betas=pap._BETAS, weight_decay=0.01)
    x, y = next(task.batches("train", 4))
    for _ in range(3):
        for net in (model, twin):
            logits = net(input_ids=x.long()).logits
            net.zero_grad()
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten()).backward()
        training._step(1e-3)
        optimiser.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def _sizes(parts: Any) -> dict[Any, int]:
    sizes = {("hidden", -1): parts.width}
    for i, layer in enumerate(parts.layers):
        sizes |= {("heads", i): layer.attention.groups, ("units", i): layer.feed.width}
    return sizes
