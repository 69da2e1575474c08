"""Splits by gradient matching, supernets in two parts, and the curriculum on the sharing extent."""

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from espalier import tasks, train
from espalier.errors import EspalierError
from espalier.estimators.one_shot import OneShot
from espalier.nets import Supernet, elastic
from espalier.nets.close import CLOSENet
from espalier.nets.nb201_supernet import NB201Supernet
from espalier.space import Space, choice
from espalier.train import Recipe, Uniform, loop, matching
from espalier.train.sharing import Curriculum
from espalier.train.splitting import FewShot, Splitting


@pytest.fixture(scope="module")
def few():
    return tasks.make("digits:train=96,validation=60,test=60")


class Signs(Supernet):
    """A shared linear layer before one of four fixed maps: two pull it one way, two the other."""

    def __init__(self):
        super().__init__((1, 2, 2), 2)
        self.shared = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
        self.tail = elastic.OneOf(
            choice("sign", "a", "b", "c", "d"),
            {"a": Times(1.0), "b": Times(-1.0), "c": Times(0.9), "d": Times(-0.9)},
        )
        self.other = elastic.OneOf(choice("other", "x", "y"), {"x": Times(1.0), "y": Times(1.01)})


class Times(nn.Module):
    def __init__(self, by):
        super().__init__()
        self.by = by

    def forward(self, x):
        return self.by * x


class Steep(tasks.tensors.TensorTask):
    """A loss whose gradient by the outputs is always the same."""

    metrics = ()

    def __init__(self):
        x, y = torch.rand(40, 1, 2, 2) + 0.5, torch.zeros(40)
        super().__init__(dict.fromkeys(("train", "validation", "test"), (x, y)), 2)

    def loss(self, outputs, targets):
        return outputs.sum(1).mean()

    def measure(self, outputs, targets):
        return {}


def test_options_that_pull_the_same_way_stay_together():
    net = Signs()
    found = matching.distances(net, Steep(), batches=2, batch=8)
    opposed = np.array([[0, 2, 0, 2], [2, 0, 2, 0], [0, 2, 0, 2], [2, 0, 2, 0]])
    assert np.allclose(found["sign"], opposed, atol=1e-5)  # 1 - cos of -1 and 1
    assert np.allclose(found["other"], 0, atol=1e-5)
    split = matching.best_split(net.space, found)
    assert split.decision == "sign"
    assert {frozenset(g) for g in split.groups} == {frozenset("ac"), frozenset("bd")}


def test_distances_are_those_of_gradients_taken_one_by_one(few):
    torch.manual_seed(0)
    net = NB201Supernet(few.shape, few.classes, channels=4, cells=1)
    before = copy.deepcopy(net.state_dict())
    found = matching.distances(net, few, batches=2, batch=16, seed=3)
    assert list(found) == list(net.space.names)
    assert all(np.allclose(far, far.T) and (far.diagonal() == 0).all() for far in found.values())
    after = net.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None for p in net.parameters())

    data = list(few.batches("train", 16, train.loop.generator(3, matching._CONTEXTS)))[:2]
    drawn = net.space.sample(2, np.random.default_rng([3, matching._CONTEXTS]))
    contexts = [c.to_json() for c in net.space.decode(drawn)]
    pulls = []
    for option in ("nor_conv_1x1", "avg_pool_3x3"):
        net.train().zero_grad()
        for (x, y), context in zip(data, contexts, strict=True):
            net.activate({**context, "op_2_1": option})
            F.cross_entropy(net(x), y).backward()
        weights = [p for p in net.parameters() if p.ndim > 1]
        taken = [torch.zeros_like(p) if p.grad is None else p.grad for p in weights]
        pulls.append([gradient.flatten(1) for gradient in taken])
    cosines = torch.cat([F.cosine_similarity(a, b) for a, b in zip(*pulls, strict=True)])
    both = torch.cat(
        [(a.norm(dim=1) > 0) & (b.norm(dim=1) > 0) for a, b in zip(*pulls, strict=True)]
    )
    assert found["op_2_1"][2, 4] == pytest.approx(float((1 - cosines[both]).mean()), abs=1e-4)


def test_the_best_groups_are_found_among_all():
    rng = np.random.default_rng(0)
    far = rng.random((6, 6))
    far = far + far.T - 2 * np.diag(far.diagonal())
    space = Space([choice("six", *"abcdef")])
    split = matching.best_split(space, {"six": far})

    def within(group):
        return sum(far[i, j] for i, j in itertools.combinations(group, 2))

    divisions = [
        (within(left), within([i for i in range(6) if i not in left]), left)
        for size in (1, 2, 3)
        for left in map(list, itertools.combinations(range(6), size))
    ]
    least = min(divisions, key=lambda d: d[0] + d[1])[2]
    groups = {frozenset("abcdef".index(o) for o in group) for group in split.groups}
    assert groups == {frozenset(least), frozenset(set(range(6)) - set(least))}


def test_a_random_split_is_of_equal_groups_and_the_seeds_own():
    net = NB201Supernet((3, 8, 8), 4, channels=4, cells=1)
    splits = [matching.random_split(net.space, seed) for seed in range(8)]
    assert splits[0] == matching.random_split(net.space, 0)
    assert len({s.decision for s in splits}) > 2
    assert len({s.groups for s in splits}) > 4
    for split in splits:
        assert [len(g) for g in split.groups] == [3, 2]
        assert sorted(sum(split.groups, ())) == sorted(net.space[split.decision].options)


def divided(seed=0):
    torch.manual_seed(seed)
    net = FewShot(NB201Supernet((1, 8, 8), 10, channels=4, cells=1))
    options = net.space["op_3_0"].options
    return net, matching.Split("op_3_0", (tuple(options[:3]), tuple(options[3:])))


def test_each_candidate_is_of_the_part_that_holds_it():
    net, split = divided()
    rows = net.space.sample(20, np.random.default_rng(1))
    candidates = net.space.decode(rows)
    assert not net.divided
    assert {net.part(c) for c in candidates} == {0}
    with torch.no_grad():
        net.parts[0].stem.conv.weight.add_(1.0)  # what was learned before is of both
    net.divide(split)
    for candidate in candidates:
        assert net.part(candidate) == (candidate["op_3_0"] in split.groups[1])
    one, two = (p.state_dict() for p in net.parts)
    assert all(torch.equal(one[name], two[name]) for name in one)
    with torch.no_grad():
        net.parts[1].head.linear.bias.add_(5.0)
    x = torch.randn(3, 1, 8, 8)
    net.eval()
    for candidate in candidates:
        net.activate(candidate)
        part = net.parts[net.part(candidate)]
        part.activate(candidate)
        assert net.active == candidate
        assert torch.equal(net(x), part(x))
        assert torch.allclose(net.extract(candidate)(x), part(x), atol=1e-5)
    with pytest.raises(EspalierError, match="divided already"):
        net.divide(split)


def test_parts_learn_from_their_own_candidates_only(few):
    net, split = divided()
    net.divide(split)
    start = copy.deepcopy(net.state_dict())
    paths = train.Within({"op_3_0": split.groups[1]})
    train.train_supernet(net, few, Recipe(epochs=1, batch=32, lr=0.05), 0, paths=paths)
    after = net.state_dict()
    moved = {name for name in after if not torch.equal(start[name], after[name])}
    assert moved
    assert all(name.startswith("parts.1") for name in moved)


def by_gradients(task, seed=0):
    torch.manual_seed(seed)
    net = FewShot(NB201Supernet(task.shape, task.classes, channels=4, cells=1))
    return net, Splitting(net, task, at=0.5, batches=1, batch=16)


def growing(task, seed=0):
    torch.manual_seed(seed)
    net = CLOSENet(task.shape, task.classes, channels=4, cells=1, blocks=3)
    return net, Curriculum(net, (0.3, 0.6))


def test_a_split_is_made_once_and_estimates_come_from_the_parts(few):
    net, paths = by_gradients(few)
    train.train_supernet(net, few, Recipe(epochs=2, batch=32, lr=0.05), 0, paths=paths)
    assert net.divided
    assert paths.found is not None
    assert set(paths.found.distances) == set(net.space.names)
    assert (net.split.decision, net.split.groups) == (paths.found.decision, paths.found.groups)
    one, two = (p.stem.conv.weight for p in net.parts)
    assert not torch.equal(one, two)
    candidates = list(net.space.decode(net.space.sample(6, np.random.default_rng(2))))
    both = OneShot(net, few, images=40, calibration_images=32).estimate(candidates)["loss"]
    for part in (0, 1):
        alone = OneShot(net.parts[part], few, images=40, calibration_images=32)
        rows = [i for i, c in enumerate(candidates) if net.part(c) == part]
        assert np.allclose(alone.estimate(candidates)["loss"][rows], both[rows], atol=1e-5)


def test_blocks_come_when_they_are_due(few):
    net, paths = growing(few)
    assert [paths.due(epoch, 10) for epoch in range(10)] == [1, 1, 1, 2, 2, 2, 3, 3, 3, 3]
    seen = []

    def note(done, total, text):
        seen.append(net.blocks)

    recipe = Recipe(epochs=5, batch=48, lr=0.05)
    train.train_supernet(net, few, recipe, 0, paths=paths, progress=note)
    assert seen == [1, 1, 2, 3, 3]
    with pytest.raises(EspalierError, match="rise from 0 to 1"):
        Curriculum(net, (0.5, 0.2))


@pytest.mark.parametrize("make", [by_gradients, growing])
def test_a_stopped_training_resumes_to_the_same_bits(few, tmp_path, monkeypatch, make):
    monkeypatch.setattr(loop, "_SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    recipe, path = Recipe(epochs=4, batch=48, lr=0.05), tmp_path / "few.safetensors"
    whole, paths = make(few)
    expected = train.train_supernet(whole, few, recipe, 1, paths=paths)

    def stop(done, total, text):
        raise KeyboardInterrupt

    for _ in range(3):  # stopped after each epoch, so also right before and after what changes
        parts, paths = make(few, seed=5)
        parts.load_state_dict(make(few)[0].state_dict())
        with pytest.raises(KeyboardInterrupt):
            train.train_supernet(parts, few, recipe, 1, paths=paths, checkpoint=path, progress=stop)
    last, paths = make(few)
    found = train.train_supernet(last, few, recipe, 1, paths=paths, checkpoint=path)
    assert found == expected
    if make is by_gradients:
        split, again = whole.split, paths.found  # of a training that was divided before it stopped
        assert split is not None
        assert again is not None
        assert (again.decision, again.groups) == (split.decision, split.groups)
        assert by_gradients(few)[0].split is None
    left, right = last.state_dict(), whole.state_dict()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_samplers_refuse_what_cannot_be(few):
    net, _ = divided()
    with pytest.raises(EspalierError, match="gradients or random, got 'size'"):
        Splitting(net, few, by="size")
    with pytest.raises(EspalierError, match="below 1, got 1"):
        Splitting(net, few, at=1)
    assert Splitting(net, few, paths=Uniform(2)).to_json()["paths"] == 2
