"""CLOSE, GM few-shot NAS and FBNetV5 as recipes, at the smoke scale."""

import json

import numpy as np
import pytest

from espalier import recipes
from espalier.recipes import _one_shot, gm_nas


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("one_shot")


def test_close_runs_and_says_what_it_cost(folder):
    found = recipes.run("close", "smoke", 0, folder)
    assert json.loads(json.dumps(found)) == found
    rows = found["rows"]
    assert rows["close"]["passes"] == rows["one_block"]["passes"] == 16
    assert rows["uniform_longer"]["passes"] == 24
    assert found["check"]["holds"] is False  # digits are no data set of the table
    kept = len(list(folder.iterdir()))
    assert recipes.run("close", "smoke", 0, folder)["rows"] == rows
    assert len(list(folder.iterdir())) == kept == len(rows)


def test_gm_nas_splits_an_edge_and_pays_for_it(folder):
    found = recipes.run("gm-nas", "smoke", 0, folder)
    assert json.loads(json.dumps(found)) == found
    rows = found["rows"]
    matched, plan = rows["split_by_gradients"], _one_shot.PLANS["smoke"]
    assert matched["passes"] == matched["steps"] + plan.matching * 30
    together = [option for group in matched["split"]["groups"] for option in group]
    assert sorted(together) == sorted(_one_shot.OPERATORS)
    assert rows["split_at_random"]["split"]["distances"] == {}
    assert set(found["check"]["convolutions"]) >= {"nearest", "in_one_group"}


def test_convolutions_together_reads_the_distances():
    far = np.full((5, 5), 1.0)
    far[2, 3] = far[3, 2] = 0.2
    split = {
        "decision": "op_1_0",
        "groups": [["none", "skip_connect"], ["nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3"]],
        "distances": {"op_1_0": far.tolist(), "op_2_0": far.tolist()},
    }
    found = gm_nas.convolutions_together(split)
    assert found["nearest"]
    assert found["in_one_group"]
    assert found["distance_of_convolutions"] == pytest.approx(0.2)
    split["groups"] = [["nor_conv_1x1"], ["nor_conv_3x3"]]
    assert not gm_nas.convolutions_together(split)["in_one_group"]


def test_every_method_costs_the_same_passes():
    plan = _one_shot.PLANS["cpu"]
    task = _one_shot.PLANS["smoke"].task
    for name, method in _one_shot.METHODS.items():
        supernet, paths = method.make(plan, task)
        paths.begin(supernet.space, 0, 4, 3, 0)
        assert len(paths(1)) == method.each, name


def test_the_ranked_cells_are_always_the_same():
    plan = _one_shot.PLANS["cpu"]
    ranked = _one_shot.cells(plan)
    assert len(set(ranked)) == 200
    assert ranked == _one_shot.cells(plan)
