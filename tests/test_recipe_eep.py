"""Pruning and merging experts by evolution: genomes keep their rules, the model is what they say."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from espalier import recipes
from espalier.compress.language.shape.surgery import keep_experts
from espalier.recipes import eep
from espalier.recipes._parts import language
from espalier.recipes._parts.expert_search import (
    Evolution,
    Genome,
    Mixtures,
    Settings,
    loss,
    ordered,
)
from espalier.testing.language import tiny


def ids(n: int = 2, t: int = 16) -> torch.Tensor:
    return torch.randint(0, 64, (n, t), generator=torch.Generator().manual_seed(0))


def target(genome: Genome) -> float:
    """Best where the last experts are kept, and mixed with the first by 0.3."""
    goal = torch.zeros_like(genome.mix)
    goal[:, :, -genome.mix.shape[1] :] = torch.eye(genome.mix.shape[1]).double()
    goal[:, :, 0] += 0.3
    missing = (genome.mix.sum(1) - goal.sum(1)).abs().sum()
    return -3 * float(missing)


def evolution(seed: int = 0, kept: int = 3) -> Evolution:
    return Evolution(target, 4, 6, kept, np.random.default_rng(seed), Settings(starts=8))


def test_pruning_keeps_each_expert_once_and_tries_nothing_twice() -> None:
    search = evolution()
    search.prune(60)
    assert len(search.seen) == 60
    choices = set()
    for _, genome in search.seen:
        assert torch.equal(genome.mix, genome.router)
        assert ((genome.mix == 0) | (genome.mix == 1)).all()
        assert (genome.mix.sum(-1) == 1).all()
        assert (genome.mix.sum(1) <= 1).all()
        choices.add(tuple(genome.kept.sort(-1).values.flatten().tolist()))
    assert len(choices) == 60
    blind = evolution()
    blind.prune(60, only_random=True)
    assert search.best[0] > blind.best[0]


def test_informed_starts_come_first() -> None:
    search = evolution()
    given = [ordered([torch.arange(6.0)] * 4, 3), ordered([-torch.arange(6.0)] * 4, 3)]
    search.begin(given)
    search.prune(10)
    assert [g for _, g in search.seen[:2]] == given
    assert len(search.seen) == 12
    near = given[0].kept  # the best: mutants differ from it in some places only
    assert all(float((g.kept == near).double().mean()) > 0.5 for _, g in search.seen[2:])


def test_merging_goes_on_from_what_pruning_found() -> None:
    search = evolution()
    search.prune(80)
    before, asked = search.best[0], len(search.seen)
    search.merge(300)
    assert len(search.seen) == asked + 300
    assert search.best[0] > before
    again = evolution()
    again.prune(80)
    again.merge(300)
    assert [v for v, _ in again.seen] == [v for v, _ in search.seen]
    top = search.top(5)
    assert [target(g) for g in top] == sorted((v for v, _ in search.seen), reverse=True)[:5]


def test_mixtures_of_one_hot_rows_are_the_pruned_model() -> None:
    model = tiny("mixtral")
    mixtures = Mixtures(model, 2, ids())
    kept = torch.tensor([[1, 3], [0, 2]])
    score = mixtures.score(Genome.keeping(kept, 4))
    for layer in range(2):
        keep_experts(model, layer, kept[layer].tolist())
    assert score == pytest.approx(-100 * loss(model, ids()), rel=1e-5)
    with torch.no_grad():
        plain = model(ids(), labels=ids()).loss
    assert loss(model, ids()) == pytest.approx(float(plain), rel=1e-5)
    assert mixtures.calls == 1
    genome = ordered([torch.tensor([0.1, 0.4, 0.2, 0.3]), torch.tensor([4.0, 1, 2, 3])], 2)
    assert genome.kept.tolist() == [[1, 3], [0, 3]]


def test_the_search_differentiates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **settings: object) -> None:
        raise AssertionError("a gradient was asked for")

    setting = eep._SCALES["smoke"]
    model = language.fresh_model("experts", 0, **dict(setting.sizes)).eval()
    before = {n: p.clone() for n, p in model.named_parameters()}
    monkeypatch.setattr(torch.Tensor, "backward", refuse)
    monkeypatch.setattr(torch.autograd, "grad", refuse)
    found = eep.compared(model, setting, 0)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert json.loads(json.dumps(found)) == found
    asked = {"eep", "prune only", "random", "frequency", "soft", "reap", "informed"}
    assert set(found["ways"]) == asked


def test_eep_runs() -> None:
    found = recipes.run("eep")
    assert set(found["active"]) == {"as trained", "1 a token"}
    ways = found["active"]["as trained"]["ways"]
    assert found["check"] == eep.verdict(ways)
    worse = {n: {"held_out": w["held_out"] + 1} for n, w in ways.items() if n != "eep"}
    assert eep.verdict({"eep": ways["eep"], **worse})["holds"]
    assert not eep.verdict({"eep": ways["eep"], **worse, "soft": ways["eep"]})["holds"]
