"""FBNetV3: the predictor learns from what is free; the search keeps its budget and its limit."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau

from espalier import recipes, train
from espalier.bench.tables import digits
from espalier.errors import DataError, EspalierError
from espalier.estimators.predictors.pretrain import Pretrained
from espalier.nets.digits_cells import DigitsCells
from espalier.recipes import fbnetv3
from espalier.space import Space

QUICK = {"members": 2, "width": 32, "free_steps": 150, "steps": 100, "frozen": 50}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def known(rows: int = 600) -> tuple[np.ndarray, np.ndarray]:
    """Features of architectures, and their parameters and multiply-accumulates."""
    family = DigitsCells()
    codes = family.space.sample(rows, np.random.default_rng(5))
    codes = codes[family.space.unique(codes)]
    return family.space.one_hot(codes).astype(float), np.stack(family.counts(codes), axis=1)


# --- the predictor ------------------------------------------------------------------------------


def test_what_is_free_helps_where_it_decides():
    x, statistics = known()
    # an accuracy that saturates in the parameters, and noise
    y = -1 / np.log(statistics[:, 0]) + 0.01 * np.random.default_rng(0).standard_normal(len(x))
    found = {}
    for free_steps in (0, QUICK["free_steps"]):
        predictor = Pretrained(**{**QUICK, "free_steps": free_steps}).pretrain(x, statistics)
        taus = []
        for seed in range(4):
            order = np.random.default_rng(seed).permutation(len(x))
            predictor.fit(x[order[:20]], y[order[:20]], seed)
            taus.append(kendalltau(predictor.predict(x[order[20:]])[0], y[order[20:]])[0])
        found[free_steps] = np.array(taus)
    assert (found[QUICK["free_steps"]] > found[0]).all(), found
    assert found[QUICK["free_steps"]].mean() > found[0].mean() + 0.05


def test_the_recipe_columns_are_learnt_beside_the_architecture():
    x, statistics = known(200)
    knob = np.random.default_rng(1).random((len(x), 1))
    both = np.concatenate([x, knob], axis=1)
    predictor = Pretrained(**QUICK).pretrain(x, statistics)
    predictor.fit(both[:100], knob[:100, 0])
    assert kendalltau(predictor.predict(both[100:])[0], knob[100:, 0])[0] > 0.7


def test_a_frozen_encoder_stays_as_it_was_pretrained():
    x, statistics = known(100)
    y = np.random.default_rng(0).random(30)
    states = []
    for frozen in (100, 0):
        predictor = Pretrained(**{**QUICK, "frozen": frozen}).pretrain(x, statistics)
        predictor.fit(x[:30], y)
        weights = predictor.arrays()
        kept = predictor._encoders[0]
        states.append(all(np.array_equal(weights[f"net.encoder.{k}"], v) for k, v in kept.items()))
    assert states == [True, False]


def test_fitting_again_is_the_same_and_saving_keeps_what_was_learnt():
    x, statistics = known(100)
    y = np.random.default_rng(0).random(len(x))
    first = Pretrained(**QUICK).pretrain(x, statistics)
    first.fit(x[:20], y[:20], 3)
    first.fit(x[:40], y[:40], 3)  # the encoder is kept between the fits of a seed
    second = Pretrained(**QUICK).pretrain(x, statistics)
    second.fit(x[:40], y[:40], 3)
    restored = Pretrained(**QUICK)
    restored.restore(first.arrays())
    for other in (second, restored):
        for a, b in zip(first.predict(x), other.predict(x), strict=True):
            assert np.array_equal(a, b)
    second.fit(x[:40], y[:40], 4)
    assert not np.array_equal(first.predict(x)[0], second.predict(x)[0])
    assert (first.predict(x)[1] > 0).any()
    assert json.loads(json.dumps(first.settings()))["free_steps"] == QUICK["free_steps"]


def test_wrong_input_is_refused():
    x, statistics = known(10)
    with pytest.raises(DataError, match="call pretrain"):
        Pretrained().fit(x, np.ones(len(x)))
    with pytest.raises(DataError, match="statistics above 0"):
        Pretrained().pretrain(x, statistics * 0)
    with pytest.raises(DataError, match="describe the architecture"):
        Pretrained().pretrain(x, statistics).fit(x[:, :3], np.ones(len(x)))
    with pytest.raises(DataError, match="call fit"):
        Pretrained().pretrain(x, statistics).predict(x)
    with pytest.raises(EspalierError, match="members must be 1 or more, got 0"):
        Pretrained(members=0)


# --- the search ---------------------------------------------------------------------------------


class Pretended(fbnetv3.Trainer):
    """Trains nothing: accuracy is a formula of the width, a kernel and the learning rate."""

    def __call__(self, codes, split="validation", salt=0):
        rng = np.random.default_rng([self.seed, salt])
        return np.array(
            [
                4 * (c["head"] == "flat")
                + 2 * (c.get("op1.0") == "conv3")
                + 2 * (c.get("op2.0") == "conv1")
                + {0.0125: -4, 0.025: -2, 0.05: 0, 0.1: 2, 0.2: 4, 0.4: -6}[c.get("lr", 0.05)]
                + 0.2 * rng.standard_normal()
                for c in self.space.decode(codes)
            ]
        )


def trainer(seed: int, joint: bool = True) -> Pretended:
    space = DigitsCells().space
    more = fbnetv3.TRAINING if joint else ()
    return Pretended(Space([*space.decisions, *more]), 1, seed)


def test_the_search_keeps_its_budget_and_the_limit_and_beats_random():
    plan = replace(fbnetv3._SCALES["cpu"], pool=500, predictor=QUICK)
    ahead = 0
    for seed in range(3):
        work = trainer(seed)
        codes, values = fbnetv3.search(work, plan, seed)
        assert len(codes) == len(values) == plan.trainings == 60
        assert len(work.space.unique(codes)) == 60
        macs = DigitsCells().counts(codes[:, :8])[1]
        assert macs.max() <= fbnetv3.MACS
        drawn = fbnetv3._within(work, 60, np.random.default_rng(seed), None)
        assert DigitsCells().counts(drawn[:, :8])[1].max() <= fbnetv3.MACS
        ahead += values.max() > work(drawn).max()
        assert values[20:].mean() > values[:20].mean() + 1  # the predictor has learnt something
        if ahead == 2:
            break
    assert ahead >= 2


def test_evolution_on_the_predictor_proposes_what_is_new_and_best():
    work, rng = trainer(0), np.random.default_rng(0)
    codes = fbnetv3._within(work, 20, rng, None)
    asked = []

    def predict(rows):
        asked.append(len(rows))
        return rows[:, 0] + rows[:, 8] / 10.0, np.ones(len(rows))  # wide, a high learning rate

    found = fbnetv3.evolve(work, fbnetv3._SCALES["cpu"], 0, codes, np.ones(20), predict)
    assert len(found) == 10
    assert (work.excess(found) == 0).all()
    both = np.concatenate([codes, found])
    assert len(work.space.unique(both)) == 30
    drawn = fbnetv3._within(work, 300, rng, None)
    assert predict(found)[0].min() >= np.quantile(predict(drawn)[0], 0.9)
    assert len(asked) < 2 + fbnetv3._SCALES["cpu"].generations  # it stops where nothing gets better


def test_the_decided_recipe_is_the_one_that_trains(monkeypatch):
    seen = []
    monkeypatch.setattr(train, "fit", lambda n, d, recipe, seed: seen.append((recipe, seed)))
    monkeypatch.setattr(train, "evaluate", lambda n, d, split: {"accuracy": 0.5})
    space = Space([*DigitsCells().space.decisions, *fbnetv3.TRAINING])
    work = fbnetv3.Trainer(space, 4, 0)
    codes = space.sample(3, np.random.default_rng(0))
    assert work(codes).tolist() == [50.0] * 3
    for (recipe, _), candidate in zip(seen, space.decode(codes), strict=True):
        assert recipe.epochs == 4
        for name in fbnetv3.DEFAULT:
            assert getattr(recipe, name) == candidate[name]
    work(codes[:1], salt=1)
    assert seen[3][1] != seen[0][1]  # another seed for the report
    alone = fbnetv3.Trainer(DigitsCells().space, 4, 0)
    alone(alone.space.sample(1, np.random.default_rng(0)))
    assert {name: getattr(seen[4][0], name) for name in fbnetv3.DEFAULT} == fbnetv3.DEFAULT


def test_a_training_that_diverges_has_the_accuracy_of_chance(monkeypatch):
    def diverge(*args):
        raise train.Diverged("the loss is nan")

    monkeypatch.setattr(train, "fit", diverge)
    work = fbnetv3.Trainer(DigitsCells().space, 1, 0)
    assert work(work.space.sample(2, np.random.default_rng(0))).tolist() == [10.0, 10.0]


@pytest.mark.skipif(not digits.FILE.exists(), reason="the table is not made yet")
def test_the_recipe_runs():
    found = json.loads(json.dumps(recipes.run("fbnetv3", "smoke", 0)))
    check = found["check"]
    assert check["trainings"] == 9
    assert set(check["test"]) == {"joint", "architecture", "random"}
    assert all(arm["trainings"] == 9 for arm in found["arms"].values())
    assert all(arm["macs"] <= found["macs_limit"] for arm in found["arms"].values())
    assert check["holds"] == (check["joint_ahead"] and check["pretraining_ahead"])
    assert set(check["tau_at_20_labels"]) == {"pretrained", "plain", "params", "macs"}
