"""Once-for-All: what its calendar opens, and that the recipe runs and judges."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from espalier import recipes, tasks
from espalier.nets import MobileNet
from espalier.recipes import ofa
from espalier.train.shrinking import restricted


def test_a_dimension_opens_an_option_at_a_time():
    opened = {"kernel": 3}
    stages = ofa.calendar("depth", 3, opened, 2)
    assert [s.part for s in stages] == [
        {"*.kernel": 3, "*.depth": 2, "*.expansion": 1},
        {"*.kernel": 3, "*.depth": 3, "*.expansion": 1},
    ]
    assert [s.subnets for s in stages] == [2, 2]
    assert stages[1].share == 5 * stages[0].share
    assert len(ofa.calendar("kernel", 3, {}, 1)) == 1


def test_each_stage_of_the_published_order_holds_the_last():
    net = MobileNet((1, 8, 8), 10, **ofa._SCALES["cpu"].family | {"resolution": 8})
    opened, sizes = {}, []
    for place, name in enumerate(ofa.DIMENSIONS, 1):
        most = max(d.count for d in net.space.decisions if d.name.endswith(name))
        sizes += [
            restricted(net.space, s.part).size for s in ofa.calendar(name, most, opened, place)
        ]
        opened[name] = most
    assert all(a < b for a, b in pairwise(sizes))
    assert sizes[-1] == net.space.size


def test_the_largest_is_left_as_it_was_and_shrinking_is_repeatable():
    plan = ofa._SCALES["smoke"]
    task = tasks.make("digits:train=64,validation=50,test=50")
    net = ofa._family(task, plan, 0)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    first, second = (ofa.shrunk(net, task, plan, ofa.DIMENSIONS, 0) for _ in range(2))
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.head.linear.weight, net.head.linear.weight)


@pytest.mark.parametrize(("scale", "shape"), [("cpu", (3, 16, 16)), ("gpu", (3, 32, 32))])
def test_every_scale_has_a_family_with_the_three_dimensions(scale, shape):
    net = MobileNet(shape, 10, transform=True, **ofa._SCALES[scale].family)
    for name in ofa.DIMENSIONS:
        assert any(d.name.endswith(f".{name}") and d.count > 1 for d in net.space.decisions)
    assert not any(d.name.endswith(".width") for d in net.space.decisions)


def test_the_verdict():
    scores = {"sliced": [0.3, 0.3], "shrunk": [0.5, 0.4], "reversed": [0.4, 0.4]}
    assert ofa.verdict(scores, [0.505])["holds"]  # of the same network: 0.5
    assert not ofa.verdict(scores, [0.52])["holds"]
    assert not ofa.verdict({**scores, "sliced": [0.44, 0.44]}, [0.5])["holds"]
    assert ofa.verdict(scores, [0.5])["shrunk_less_reversed"] == pytest.approx(0.05)


def test_the_recipe_runs(tmp_path, monkeypatch):
    shorter = {"kernel": 2, "depth": 3, "expansion": 4}
    plan = replace(ofa._SCALES["smoke"], shrink_epochs=shorter, subnets=4)
    monkeypatch.setitem(ofa._SCALES, "smoke", plan)
    found = recipes.run("ofa", "smoke", 0, tmp_path)
    assert json.loads(json.dumps(found))["check"]["shrunk_less_sliced"] > 0.02
    assert sum(1 for _ in tmp_path.rglob("*.safetensors")) == 7  # the largest, and each stage twice
