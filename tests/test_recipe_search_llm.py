"""Search-LLM: slices of a size, FLAP's choice, and what puts back what they lost."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from espalier import recipes
from espalier.recipes import search_llm
from espalier.recipes._parts import language, slicing
from espalier.recipes._parts.slicing import Reformation, flap, inputs_kept, masked, optimum, sliced
from espalier.recipes._parts.sublayers import loss

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32}


@pytest.fixture(scope="module")
def model():
    made = language.fresh_model("dense", 0, **SIZES).eval()
    for p in made.parameters():
        p.data.mul_(8.0)  # so that slices matter
    return made


@pytest.fixture(scope="module")
def ids():
    return language.windows("train", 4, 0, 24)


@pytest.fixture(scope="module")
def job(model, ids):
    return search_llm.Job(model, ids, search_llm.Scale(10, 6, 4, 2, width=8, starts=3))


def test_search_llm_runs() -> None:
    found = recipes.run("search-llm")
    assert json.loads(json.dumps(found)) == found
    (rows,) = found["sizes"].values()
    whole = sum(p.numel() for p in language.fresh_model("dense", 0, **SIZES).parameters())
    for row in rows.values():
        assert 0.7 * whole <= row["params"] <= 0.8 * whole + 2 * 2 * 16  # biases
    assert rows["random"]["evaluations"] == rows["evolution"]["evaluations"] == 6
    course = rows["evolution"]["over_search"]
    assert course == sorted(course, reverse=True)


def test_the_loss_of_a_candidate_is_that_of_the_built_model(job) -> None:
    for row in job.space.sample(3, np.random.default_rng(0)):
        candidate = job.space.decode(row[None])[0]
        built = job.family.build(candidate)
        assert job.params(row[None])[0] == sum(p.numel() for p in built.parameters())
        ours = sliced(job.model, *job.chosen(candidate))
        assert loss(ours, job.fit) == pytest.approx(loss(built, job.fit), abs=1e-5)
        kept = inputs_kept(job.model, *job.chosen(candidate))
        with masked(job.model, kept):
            assert loss(job.model, job.fit) == pytest.approx(loss(built, job.fit), abs=1e-4)
        whole = slicing.compensate(built, job.model, kept, job.seen)
        assert job.value(row) == pytest.approx(loss(whole, job.fit), abs=1e-4)


def test_masks_leave_nothing_behind(model, ids) -> None:
    before = {n: p.clone() for n, p in model.named_parameters()}
    kept = inputs_kept(model, {0: torch.tensor([1])}, {1: torch.arange(5)})
    assert {path.split(".")[-1]: len(k) for path, k in kept.items()} == {
        "o_proj": 8,
        "down_proj": 5,
    }
    with masked(model, kept):
        changed = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert sorted(n.split(".")[-2] for n in changed) == ["down_proj", "o_proj"]
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_evolution_stays_within_the_size_and_is_seeded(job) -> None:
    most = 0.8 * job.whole
    first, told = job.evolved(most, 3)
    again, _ = job.evolved(most, 3)
    assert (first == again).all()
    assert job.fits(first[None], most).all()
    assert told["loss"] == pytest.approx(job.value(first))
    starts = job.by_importance(most)
    assert job.fits(starts, most).all()
    assert told["loss"] <= min(job.value(row) for row in starts[:6]) + 1e-9


def test_trades_stay_in_the_space(job) -> None:
    rows = np.repeat(job.by_importance(0.8 * job.whole)[:1], 50, axis=0)
    made = search_llm.traded(job.space, rows, np.random.default_rng(0))
    assert job.space.valid(made).all()
    assert (made != rows).any(axis=1).mean() > 0.8
    assert abs(np.mean(job.params(made)) - job.params(rows)[0]) < 0.05 * job.whole


def test_flap_keeps_the_highest_of_all_layers(model) -> None:
    groups = {0: torch.tensor([1.0, 9.0]), 1: torch.tensor([5.0, 7.0])}
    units = {0: torch.arange(32.0), 1: torch.arange(32.0) + 16}
    whole = float(sum(p.numel() for p in model.parameters()))
    found = flap(model, groups, units, 0.8 * whole, standard=False)
    low = min(float(units[i][k].min()) for i, k in found[1].items())
    assert all((units[i] >= low).sum() == len(found[1][i]) for i in units)
    cut = sliced(model, *found)
    left = sum(p.numel() for p in cut.parameters())
    assert left <= 0.8 * whole
    step = 2 * 3 * 16 + 16 * 4 * 6  # the next threshold takes a unit of each layer, or a group
    assert left > 0.8 * whole - step


def test_reformation_is_near_the_closed_form_and_better_than_cutting(model, ids) -> None:
    data = slicing.seen(model, ids)
    path = "model.layers.0.mlp.down_proj"
    taken = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda m, a: taken.append(a[0]))
    with torch.no_grad():
        model(ids, use_cache=False)
    hook.remove()
    x = taken[0].flatten(0, 1).double()
    assert torch.allclose(data.gram[path], x.T @ x / len(x), rtol=1e-4, atol=1e-6)
    whole, kept = model.get_submodule(path).weight.detach(), torch.arange(20)

    def error(new: torch.Tensor) -> float:
        return float((x @ whole.double().T - x[:, kept] @ new.double().T).square().sum())

    plain = error(whole[:, kept])
    near = error(Reformation().weight(whole, data.gram[path], kept))
    exact = error(optimum(whole, data.gram[path], kept, 1e-9))
    many = error(Reformation(rho=1.0, rounds=2000, damp=1e-9).weight(whole, data.gram[path], kept))
    assert exact < near < plain
    assert many == pytest.approx(exact, rel=0.02)
    least = torch.linalg.lstsq(x[:, kept], x @ whole.double().T).solution.T
    assert exact == pytest.approx(error(least), rel=1e-4)


def test_a_bias_makes_up_for_the_mean_of_what_went(model, ids) -> None:
    data = slicing.seen(model, ids)
    units = {0: torch.arange(6)}
    kept = inputs_kept(model, {}, units)
    cut = sliced(model, {}, units)
    path = "model.layers.0.mlp.down_proj"
    slicing.compensate(cut, model, kept, data)
    outputs = []
    for one in (model, cut):
        hook = one.get_submodule(path).register_forward_hook(lambda m, a, o: outputs.append(o))
        with torch.no_grad():
            one(ids, use_cache=False)
        hook.remove()
    assert torch.allclose(outputs[0].mean((0, 1)), outputs[1].mean((0, 1)), atol=1e-4)


def test_the_first_rows_keep_the_most_important(job) -> None:
    row = job.by_importance(0.8 * job.whole)[0]
    _, units = job.chosen(job.space.decode(row[None])[0])
    for layer, kept in units.items():
        gone = np.setdiff1d(np.arange(len(job.units[layer])), kept.numpy())
        if len(gone):
            assert job.units[layer][kept].min() >= job.units[layer][gone].max()
