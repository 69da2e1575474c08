"""CLOSE, GM few-shot NAS and FBNetV5 as recipes, at the smoke scale."""

import json

import numpy as np
import pytest
import torch

from espalier import recipes
from espalier.recipes import fbnetv5, gm_nas
from espalier.recipes._parts import one_shot, three_tasks


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
    matched, plan = rows["split_by_gradients"], one_shot.PLANS["smoke"]
    assert matched["passes"] == matched["steps"] + plan.matching * 30
    together = [option for group in matched["split"]["groups"] for option in group]
    assert sorted(together) == sorted(one_shot.OPERATORS)
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
    plan = one_shot.PLANS["cpu"]
    task = one_shot.PLANS["smoke"].task
    for name, method in one_shot.METHODS.items():
        supernet, paths = method.make(plan, task)
        paths.begin(supernet.space, 0, 4, 3, 0)
        assert len(paths(1)) == method.each, name


def test_the_ranked_cells_are_always_the_same():
    plan = one_shot.PLANS["cpu"]
    ranked = one_shot.cells(plan)
    assert len(set(ranked)) == 200
    assert ranked == one_shot.cells(plan)


def test_fbnetv5_finds_a_network_for_each_task():
    found = recipes.run("fbnetv5", "smoke", 0)
    assert json.loads(json.dumps(found)) == found
    assert set(found["found"]) == {"class", "mask", "box"}
    assert all(sum(found["found"][n].values()) == 5 for n in found["found"])
    assert found["check"]["pairs"] == 6
    assert np.abs(found["logits"]).max() > 0


def test_a_distribution_follows_its_own_task():
    """Two tasks with opposite wishes, from networks drawn from the mixture."""
    rng = np.random.default_rng(0)
    both = fbnetv5.Distributions(2, 6, 3)
    assert len(both.networks) == 20
    for _ in range(300):
        p = both.probabilities().mean(0).double().numpy()
        drawn = torch.from_numpy(rng.choice(len(p), size=4, p=p / p.sum()))
        first = both.networks[drawn][:, :3].sum(1)  # task 0 wants the first half, task 1 the second
        both.step(drawn, torch.stack([-first, first], dim=1), 0.2)
    likeliest = both.networks[both.best()]
    assert likeliest.tolist() == [[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]]


def test_the_step_of_a_distribution_is_the_gradient_of_the_expected_reward():
    """Over all networks, weighted by the mixture, against autograd."""
    both = fbnetv5.Distributions(2, 5, 2)
    both.logits += torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    rewards = torch.randn(10, 2, generator=torch.Generator().manual_seed(1))
    logits = both.logits.clone().requires_grad_()
    p = torch.softmax(logits @ both.networks.T, dim=1)
    (p * rewards.T).sum().backward()
    before = both.logits.clone()
    mixture = both.probabilities().mean(0)
    counts = (mixture * 20000).round().long()
    both.step(
        torch.repeat_interleave(torch.arange(10), counts),
        torch.repeat_interleave(-rewards, counts, 0),
        1.0,
    )
    moved = both.logits - before
    for task in (0, 1):
        wanted = logits.grad[task]
        assert torch.allclose(moved[task] / moved[task].norm(), wanted / wanted.norm(), atol=0.02)


def test_canvases_hold_what_their_targets_say():
    task = three_tasks.canvases(20, 10, 10)
    x, targets = next(task.batches("train", 20))
    assert x.shape == (20, 1, 16, 16)
    for row in targets:
        mask = row[1:-4].reshape(16, 16)
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        assert torch.allclose(row[-4:] * 16, torch.stack(box).float())
    perfect = torch.cat(
        [100 * torch.eye(10)[targets[:, 0].long()], 20 * targets[:, 1:-4] - 10, targets[:, -4:]], 1
    )
    assert task.measure(perfect, targets) == {"accuracy": 1.0, "mask_iou": 1.0, "box_iou": 1.0}
    assert float(task.loss(perfect, targets)) < 1e-2
    off = perfect.clone()
    off[:, -4:] += torch.tensor([1.0, 0, 1, 0])  # a whole canvas away
    assert task.measure(off, targets)["box_iou"] == 0.0
    assert task.only("box").measure(perfect[:, -4:], targets) == {"box_iou": pytest.approx(1.0)}
