"""FinerCut: what leaves, in which order, and that the trials from the middle are whole runs."""

from __future__ import annotations

import copy
import itertools
import json

import pytest
import torch

pytest.importorskip("transformers")

from espalier import recipes
from espalier.compress.language.shape.surgery import drop
from espalier.recipes import finercut
from espalier.recipes._parts import language
from espalier.recipes._parts.sublayers import Resumed, bits, divergence, influence, units, without


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = language.fresh_model("dense", 0, hidden_size=16, num_hidden_layers=3).eval()
    for p in made.parameters():
        p.data.mul_(8.0)  # so that each sub-layer matters
    return made


@pytest.fixture(scope="module")
def ids():
    return language.windows("train", 3, 0, 24)


def test_finercut_runs() -> None:
    found = recipes.run("finercut")
    assert json.loads(json.dumps(found)) == found
    (draw,) = found["draws"]
    assert found["exhaustive"]["sets"] == 6
    assert len(draw["methods"]["finercut"]["gone"]) == 2
    assert found["exhaustive"]["best"] <= draw["methods"]["finercut"]["bits_per_byte"] + 1e-9


def test_without_is_the_model_whose_parts_were_dropped(model, ids) -> None:
    gone = [(1, "attention"), (2, "feed")]
    cut = copy.deepcopy(model)
    for layer, part in gone:
        drop(cut, layer, part)
    with torch.no_grad():
        whole = model(ids).logits
        with without(model, gone):
            assert torch.allclose(model(ids).logits, cut(ids).logits, atol=1e-4)
        assert torch.equal(model(ids).logits, whole)  # nothing is left behind
    assert not torch.allclose(whole, cut(ids).logits, atol=1e-2)


def test_a_trial_from_the_middle_is_a_whole_run(model, ids) -> None:
    windows = Resumed(model, ids)
    windows.keep([(2, "feed"), (0, "feed")])
    for unit in [(1, "feed"), (2, "attention"), (0, "attention")]:
        every = [(2, "feed"), (0, "feed"), unit]
        with torch.no_grad(), without(model, every):
            expected = model(ids).logits
        assert torch.allclose(windows.logits(every), expected, atol=1e-5)


def test_greedy_takes_the_least_divergence_each_time(model, ids) -> None:
    with torch.no_grad():
        dense = model(ids).logits
        gone: list = []
        for _ in range(3):
            left = [u for u in units(model) if u not in gone]
            distance = {}
            for unit in left:
                with without(model, [*gone, unit]):
                    distance[unit] = divergence(dense, model(ids).logits)
            gone.append(min(left, key=distance.__getitem__))
    found = finercut.greedy(model, ids, 3)
    assert found.gone == gone
    assert found.passes == 7 + 6 + 5


def test_by_weights_it_ends_when_enough_are_gone(model, ids) -> None:
    sizes = units(model)
    wanted = sizes[0, "attention"] + sizes[0, "feed"]
    found = finercut.greedy(model, ids, 0, "distance a weight", wanted)
    spent = [sizes[u] for u in found.gone]
    assert sum(spent) >= wanted > sum(spent[:-1])


def test_divergence_and_influence(model, ids) -> None:
    logits = torch.tensor([[[0.0, 0.0]], [[50.0, 0.0]]])
    assert divergence(logits, logits) == pytest.approx(0.0, abs=1e-9)
    apart = divergence(torch.tensor([[[80.0, 0.0]]]), torch.tensor([[[0.0, 80.0]]]))
    assert apart == pytest.approx(0.6931, abs=1e-3)  # log 2 where nothing is shared
    parts, blocks = influence(model, ids)
    assert set(parts) == set(units(model))
    with torch.no_grad():
        states = model.model(ids, output_hidden_states=True).hidden_states
    first = 1 - torch.nn.functional.cosine_similarity(states[0], states[1], dim=-1).mean()
    assert blocks[0] == pytest.approx(float(first), abs=1e-5)


def test_every_set_is_read(model, ids) -> None:
    every = finercut.exhaustive(model, ids, 2)
    assert len(every) == len(list(itertools.combinations(range(6), 2)))
    with without(model, [(0, "feed"), (2, "feed")]):
        assert every[(0, "feed"), (2, "feed")] == pytest.approx(bits(model, ids))
