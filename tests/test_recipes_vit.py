"""The recipes of transformers and hybrids run, and judge by what they say they do."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from espalier import recipes
from espalier.costs import Counts
from espalier.nets.hierarchical import HierarchicalViT
from espalier.recipes import efficientformer_v2, shiftnas
from espalier.space import Space, ordinal
from espalier.train.onehot import one_hot


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return HierarchicalViT(
        (1, 8, 8), 4, widths=[(8, 16), (16, 24)], heads=[2, (1, 2)], depth=(1, 2), ratio=(1, 2)
    )


@pytest.fixture(scope="module")
def price(net):
    return shiftnas.macs_of(net)


def test_vit_resnas_runs():
    found = recipes.run("vit-resnas")
    assert json.loads(json.dumps(found)) == found
    assert set(found["check"]["cost_ratios"]) == {"largest", "sampled", "masked"}
    assert found["check"]["gain"]["equal_steps"] == pytest.approx(
        found["learning"]["together"]["accuracy"] - found["learning"]["one_equal_steps"]["accuracy"]
    )
    assert found["learning"]["one_equal_time"]["epochs"] >= 2
    cap = found["search"]["cap"]
    assert found["search"]["evolution"]["validation"] > 0
    assert cap > 0


def test_shiftnas_runs():
    found = recipes.run("shiftnas")
    assert json.loads(json.dumps(found)) == found
    rows = found["rows"]
    assert all(len(row["tenths"]) == 10 for row in rows.values())
    assert sum(rows["shifting"]["probabilities"]) == pytest.approx(1, abs=1e-5)
    assert found["check"]["off"]["nearest"]["mean"] <= found["check"]["off"]["first"]["mean"]


def test_the_price_of_shiftnas_is_the_count(net, price):
    codes = net.space.sample(12, np.random.default_rng(0))
    counted = np.asarray(Counts(net).estimate_codes(codes)["macs"])
    np.testing.assert_allclose(
        price(one_hot(net.space, net.space.decode(codes))).numpy(), counted, rtol=1e-6
    )


def test_subnets_are_spread_over_the_range(net, price):
    chosen, tenths = shiftnas.spread(net, price, 3, seed=0)
    assert np.bincount(tenths).tolist() == [3] * 10
    macs = price(one_hot(net.space, chosen)).numpy()
    low, high = price(one_hot(net.space, [net.uniform(0.0), net.uniform(1.0)])).tolist()
    places = (macs - low) / (high - low) * 10
    assert ((places >= tenths - 1e-6) & (places <= tenths + 1 + 1e-6)).all()


def test_efficientformer_v2_runs():
    found = recipes.run("efficientformer-v2")
    assert json.loads(json.dumps(found)) == found
    ends = found["check"]["ends"]
    goal = efficientformer_v2.PLANS["smoke"].goal
    for name, end in ends.items():
        assert (end["latency"] * end["params"]) ** -0.5 >= goal, name


class _Toy:
    """Two decisions: one saves latency alone, the other parameters alone."""

    def __init__(self, harm):
        self.space = Space([ordinal("fast", 1, 2, 4), ordinal("small", 1, 2, 4)])
        self.harm = harm

    def score(self, candidates):
        return [
            1 - self.harm[0] * (4 - c["fast"]) - self.harm[1] * (4 - c["small"]) for c in candidates
        ]

    def prices(self, codes):
        return (2.0 ** np.asarray(codes)) / 4

    def slim(self, goal):
        return efficientformer_v2.Slimming(self, self.score, self.prices, goal)


def test_slimming_takes_what_harms_least_for_what_it_looks_at():
    toy = _Toy((0.05, 0.01))
    joint = toy.slim(2.0).run((0.5, 0.5))
    assert [p["params"] for p in joint] == [1, 0.5, 0.25]  # the harmless one first, to its end
    assert [p["latency"] for p in joint] == [1, 1, 1]
    fast = toy.slim(2.0).run((1.0, 0.0))
    assert [p["latency"] for p in fast] == [1, 0.5, 0.25]
    assert fast[-1]["accuracy"] == pytest.approx(1 - 0.05 * 3)
    assert efficientformer_v2.dominates(
        {"latency": 1, "params": 1, "accuracy": 0.9}, {"latency": 1, "params": 1, "accuracy": 0.8}
    )
    assert not efficientformer_v2.dominates(joint[-1], fast[-1])


def test_a_search_that_sees_one_cost_ends_where_that_is_least():
    found = _Toy((0.05, 0.01)).slim(100.0).run((1.0, 0.0))
    assert found[-1]["latency"] == 0.25
    assert found[-1]["params"] == 1
