"""Supernet training: who learns from whom, resuming, and that every candidate learns."""

import copy

import numpy as np
import pytest
import torch

from espalier import nets, tasks, train
from espalier.train import Recipe, loop
from espalier.train import supernet as supernets
from espalier.train.sharing import Curriculum
from espalier.train.supernet import default_paths


@pytest.fixture(scope="module")
def few():
    return tasks.make("digits:train=256,validation=150,test=100")


def small(task, seed=0):
    torch.manual_seed(seed)
    return nets.MobileNet(
        task.shape,
        task.classes,
        stem=(4, 8),
        widths=[(8,), (8, 12), (12, 16)],
        depth=(1, 2),
        kernel=(3, 5),
        expansion=(1, 2),
        head=(16, 32),
    )


def same(a, b):
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_every_kind_of_candidate_learns(few):
    net = small(few)
    history = train.train_supernet(net, few, Recipe(epochs=12, batch=32), seed=0)
    assert len(history) == 12
    space = net.space
    codes = np.concatenate(
        [
            space.corner(last=False),
            space.corner(last=True),
            space.sample(2, np.random.default_rng(5)),
        ]
    )
    assert net.active == space.decode(space.corner(last=True))[0]
    for candidate in space.decode(codes):
        net.activate(candidate)
        train.recalibrate(net, few, batches=1)
        assert train.evaluate(net, few, "validation")["accuracy"] > 0.6


def test_the_sandwich(few, monkeypatch):
    """Largest on the targets, then smallest and random ones on what the largest gave."""
    net = small(few)
    active, taught = [], []
    activate, soft = net.activate, supernets.losses.soft
    monkeypatch.setattr(net, "activate", lambda c: (active.append(c), activate(c))[1])

    def recorded(outputs, teacher, targets):
        taught.append((outputs.requires_grad, teacher.requires_grad))
        return soft(outputs, teacher, targets)

    monkeypatch.setattr(supernets.losses, "soft", recorded)
    train.train_supernet(net, few, Recipe(epochs=1, batch=64), 0, random_subnets=3)
    steps = np.array(active[:-1], dtype=object).reshape(4, 5)  # 256 images, 5 networks a step
    largest, smallest = (net.space.decode(net.space.corner(last=x))[0] for x in (True, False))
    assert all(c == largest for c in steps[:, 0])
    assert all(c == smallest for c in steps[:, 1])
    assert len(set(steps[:, 2:].reshape(-1))) > 6
    assert taught == [(True, False)] * 16


def test_one_step_is_the_sum_of_the_gradients(few):
    """Against the rule written out by hand, without the loop."""
    net = small(few)
    by_hand = copy.deepcopy(net)
    one = tasks.make("digits:train=64,validation=50,test=50")
    recipe = Recipe(
        epochs=1, batch=64, precision="fp32", clip=1e9, warmup=0, momentum=0, weight_decay=0,
        augment=False,
    )  # fmt: skip
    history = train.train_supernet(net, one, recipe, seed=0, random_subnets=0)
    by_hand.train()
    order = train.loop.generator(0, 0, loop._SHUFFLE)
    x, y = next(one.batches("train", 64, order))
    space = by_hand.space
    by_hand.activate(space.decode(space.corner(last=True))[0])
    outputs = by_hand(x)
    one.loss(outputs, y).backward()
    by_hand.activate(space.decode(space.corner(last=False))[0])
    wanted = outputs.detach().softmax(1)
    smallest = by_hand(x)
    matched = -(wanted * smallest.log_softmax(1)).sum(1).mean()
    share = recipe.distil  # of the largest's outputs; the rest is the labels
    (share * matched + (1 - share) * one.loss(smallest, y)).backward()
    for (name, p), q in zip(by_hand.named_parameters(), net.parameters(), strict=True):
        if p.grad is not None:
            assert torch.allclose(p - history[0]["lr"] * p.grad, q, atol=1e-5), name


def test_same_seed_same_bits(few):
    made = [small(few) for _ in range(3)]
    for net, seed in zip(made, (3, 3, 4), strict=True):
        train.train_supernet(net, few, Recipe(epochs=2), seed)
    assert same(made[0], made[1])
    assert not same(made[0], made[2])


def test_a_stopped_training_resumes_to_the_same_bits(few, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "_SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    whole, parts, fresh = (small(few) for _ in range(3))
    recipe, path = Recipe(epochs=3), tmp_path / "supernet.safetensors"
    expected = train.train_supernet(whole, few, recipe, 1)

    def stop(done, total, text):
        raise KeyboardInterrupt

    for _ in range(2):  # stopped twice, each time after one more epoch
        with pytest.raises(KeyboardInterrupt):
            train.train_supernet(parts, few, recipe, 1, checkpoint=path, progress=stop)
    assert train.train_supernet(fresh, few, recipe, 1, checkpoint=path) == expected
    assert same(fresh, whole)


def test_the_sandwich_is_the_default(few):
    default, given = small(few), small(few)
    history = train.train_supernet(default, few, Recipe(epochs=1), 2, random_subnets=2)
    paths = train.Sandwich(2)
    assert train.train_supernet(given, few, Recipe(epochs=1), 2, paths=paths) == history
    assert same(default, given)


def test_a_supernet_that_grows_does_so_in_the_second_half():
    net = nets.make("close", (1, 8, 8), 4)
    paths = default_paths(net)
    assert isinstance(paths, Curriculum)
    assert [paths.due(epoch, 8) for epoch in range(8)] == [1, 1, 1, 1, 2, 2, 3, 3]
    assert isinstance(default_paths(nets.make("nb201-supernet", (1, 8, 8), 4)), train.Uniform)
