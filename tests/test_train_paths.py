"""Path samplers: what each promises to run, in which step, learning from what."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from espalier import nets, tasks, train
from espalier.errors import EspalierError, SpaceError
from espalier.space import Forbid, Linear, Space, choice, integer, ordinal, real
from espalier.train import Fair, Path, Recipe, Sandwich, Shrinking, Stage, Uniform, Within
from espalier.train.paths import Pass, Paths
from espalier.train.shrinking import restricted

SPACE = Space(
    [
        ordinal("depth", 1, 2),
        choice("a.kernel", 3, 5, 7),
        choice("b.kernel", 3, 5, 7, when={"depth": 2}),
        ordinal("width", 8, 16, 24, 32),
    ]
)


def drawn(paths, space=SPACE, epoch=0, epochs=1, steps=48, seed=0):
    paths.begin(space, epoch, epochs, steps, seed)
    return [list(paths(step)) for step in range(steps)]


def test_uniform_draws_all_alike_and_is_a_function_of_the_epoch():
    sampler = Uniform(2)
    steps = drawn(sampler, steps=600)
    assert all(len(step) == 2 and all(p.learn_from == "labels" for p in step) for step in steps)
    seen = Counter(p.candidate["width"] for step in steps for p in step)
    assert max(seen.values()) < 1.25 * min(seen.values())
    assert drawn(sampler, steps=600) == steps
    assert drawn(sampler, steps=600, epoch=1) != steps
    assert drawn(sampler, steps=600, seed=1) != steps


def test_fair_shows_each_option_once_a_round():
    steps = drawn(Fair())
    assert all(sorted(p.candidate["width"] for p in step) == [8, 16, 24, 32] for step in steps)
    models = [p.candidate for step in steps for p in step]
    for name, options in (("a.kernel", [3, 5, 7]), ("b.kernel", [3, 5, 7]), ("depth", [1, 2])):
        stream = [m[name] for m in models if name in m]
        k = len(options)
        for start in range(0, len(stream) - k + 1, k):
            assert sorted(stream[start : start + k]) == options, (name, start)
    orders = {tuple(p.candidate["width"] for p in step) for step in steps}
    assert len(orders) > 10  # shuffled, not in turn


def test_fair_with_few_paths_goes_on_over_steps():
    steps = drawn(Fair(paths=1), steps=8)
    assert all(len(step) == 1 for step in steps)
    widths = [step[0].candidate["width"] for step in steps]
    assert sorted(widths[:4]) == sorted(widths[4:]) == [8, 16, 24, 32]


def test_fair_keeps_constraints_and_refuses_real_decisions():
    bound = Linear({"x": 1, "y": 1}, "<=", 3)
    space = Space([ordinal("x", 1, 2, 3), ordinal("y", 1, 2, 3)], [bound])
    assert all(p.candidate["x"] + p.candidate["y"] <= 3 for s in drawn(Fair(), space) for p in s)
    with pytest.raises(SpaceError, match="'rate' is real"):
        drawn(Fair(), Space([real("rate", 0, 1)]))


def test_the_sandwich_has_its_ends_in_every_step():
    for step in drawn(Sandwich(2)):
        assert [p.teach for p in step] == [True, False, False, False]
        assert [p.learn_from for p in step] == ["labels", "both", "both", "both"]
        assert step[0].candidate == {"depth": 2, "a.kernel": 7, "b.kernel": 7, "width": 32}
        assert step[1].candidate == {"depth": 1, "a.kernel": 3, "width": 8}


def test_a_part_of_a_space_has_just_its_candidates():
    part = restricted(SPACE, {"*.kernel": 2, "a.kernel": (3,), "width": (32, 8)})
    found = set(part.decode(part.enumerate()))
    assert found == {
        c
        for c in SPACE.decode(SPACE.enumerate())
        if c["a.kernel"] == 3 and c.get("b.kernel", 5) in (5, 7) and c["width"] in (8, 32)
    }
    shallow = restricted(SPACE, {"depth": (1,)})
    assert "b.kernel" not in shallow
    assert set(shallow.decode(shallow.enumerate())) == {
        c for c in SPACE.decode(SPACE.enumerate()) if c["depth"] == 1
    }


def test_a_part_keeps_the_constraints_that_can_be_broken():
    space = Space(
        [choice("a", 1, 2, 3), choice("b", 1, 2, 3), integer("c", 0, 9)],
        [Forbid({"a": 1, "b": 1}), Forbid({"a": 2, "b": 2}), Linear({"c": 1}, "<=", 7)],
    )
    part = restricted(space, {"a": (2, 3), "c": (0, 7, 9)})
    assert set(part.decode(part.enumerate())) == {
        c for c in space.decode(space.enumerate()) if c["a"] in (2, 3) and c["c"] in (0, 7)
    }


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ({"wide": (8,)}, "Did you mean 'width'"),
        ({"width": (9,)}, "width"),
        ({"width": 0}, "at least 1 option of 'width'"),
        ({"width": "8"}, "a sequence or a number"),
    ],
)
def test_a_part_that_is_not_one(part, text):
    with pytest.raises(SpaceError, match=text):
        restricted(SPACE, part)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Stage({}, subnets=0), "whole number from 1, got 0"),
        (lambda: Stage({}, learn_from="none"), "learn_from is one of labels, teacher, both"),
        (lambda: Uniform(learn_from="me"), "learn_from is one of labels, teacher, both"),
        (lambda: Shrinking(({"*": 1},)), "a calendar is one Stage or more"),
        (lambda: Shrinking(()), "a calendar is one Stage or more"),
    ],
)
def test_a_calendar_that_is_none_is_refused_when_it_is_made(make, text):
    with pytest.raises(EspalierError, match=text):
        make()


def test_within_runs_another_sampler_on_a_part():
    steps = drawn(Within({"width": (8, 16)}, Fair()))
    assert all(len(step) == 3 for step in steps)  # the most options are the kernel's now
    assert {p.candidate["width"] for step in steps for p in step} == {8, 16}


CALENDAR = Shrinking(
    (
        Stage({"*": 1}, 1, learn_from="labels"),
        Stage({"*": 1, "*.kernel": 3}, 1),
        Stage({"*.kernel": 3, "depth": 2, "width": 1}, 2, subnets=2),
    )
)


def test_a_calendar_shrinks_stage_by_stage():
    epochs = [drawn(CALENDAR, epoch=e, epochs=4, steps=30) for e in range(4)]
    largest = {"depth": 2, "a.kernel": 7, "b.kernel": 7, "width": 32}
    assert all(s == [Path(SPACE.candidate(largest))] for s in epochs[0])
    kernels = [s[0].candidate for s in epochs[1]]
    assert {(c["depth"], c["width"]) for c in kernels} == {(2, 32)}
    assert {c["a.kernel"] for c in kernels} == {3, 5, 7}
    assert all(s[0].learn_from == "both" for s in epochs[1])
    for late in epochs[2:]:
        assert all(len(s) == 2 for s in late)
        assert {p.candidate["depth"] for s in late for p in s} == {1, 2}
        assert {p.candidate["width"] for s in late for p in s} == {32}
    assert epochs[2] != epochs[3]


def test_every_stage_gets_an_epoch():
    stages = [Shrinking((Stage({}, 100), Stage({}, 1), Stage({}, 1))).stage(e, 5) for e in range(5)]
    assert stages == [0, 0, 0, 1, 2]
    with pytest.raises(EspalierError, match="3 stages"):
        CALENDAR.stage(0, 2)


# --- in a training ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def few():
    return tasks.make("digits:train=64,validation=50,test=50")


def small(task, seed=0):
    torch.manual_seed(seed)
    return nets.MobileNet(
        task.shape, task.classes, stem=4, widths=[8, 8, (8, 16)], depth=1, kernel=3, expansion=(1, 2), head=16
    )  # fmt: skip


PLAIN = Recipe(
    epochs=1, batch=64, precision="fp32", clip=1e9, warmup=0, momentum=0, weight_decay=0, augment=False
)  # fmt: skip


def one_step(net, task, passes):
    """The gradients of one step, by hand: a list of (candidate, loss of outputs)."""
    net.train()
    order = train.loop.generator(0, 0, train.loop._SHUFFLE)
    x, y = next(task.batches("train", 64, order))
    for candidate, loss in passes:
        net.activate(candidate)
        loss(net(x), x, y).backward()


def follows(net, by_hand, lr):
    for (name, p), q in zip(by_hand.named_parameters(), net.parameters(), strict=True):
        if p.grad is not None:
            assert torch.allclose(p - lr * p.grad, q, atol=1e-5), name


def test_gradients_of_all_paths_are_added_up(few):
    net, by_hand, sampler = small(few), small(few), Fair()
    history = train.train_supernet(net, few, PLAIN, 0, paths=sampler)
    told = []

    def loss(outputs, x, y):
        told.append(few.loss(outputs, y))
        return told[-1]

    sampler.begin(net.space, 0, 1, 1, 0)
    one_step(by_hand, few, [(p.candidate, loss) for p in sampler(0)])
    follows(net, by_hand, history[0]["lr"])
    assert history[0]["loss"] == pytest.approx(torch.stack(told).mean().item(), rel=1e-5)


def test_a_teacher_given_teaches(few):
    net, by_hand, teacher = small(few), small(few), small(few, seed=1)
    stage = Stage({"*": 1}, learn_from="both")
    history = train.train_supernet(net, few, PLAIN, 0, paths=Shrinking((stage,)), teacher=teacher)

    def loss(outputs, x, y):
        with torch.no_grad():
            wanted = teacher(x).softmax(1)
        matched = -(wanted * outputs.log_softmax(1)).sum(1).mean()
        return 0.5 * matched + 0.5 * few.loss(outputs, y)

    assert not teacher.training
    one_step(by_hand, few, [(by_hand.uniform(1.0), loss)])
    follows(net, by_hand, history[0]["lr"])
    with pytest.raises(EspalierError, match="needs a teaching pass before it"):
        train.train_supernet(net, few, PLAIN, 0, paths=Shrinking((stage,)))


class Gated(Paths):
    """A sampler that learns a number, by a penalty, and is told the losses."""

    def __init__(self):
        self.module = nn.ParameterDict({"gate": nn.Parameter(torch.zeros(1))})
        self.told, self.sizes = [], []

    def begin(self, space, epoch, epochs, steps, seed):
        self.largest = space.decode(space.corner(last=True))[0]

    def __call__(self, step):
        gate, sizes, largest = self.module["gate"], self.sizes, self.largest

        class Largest(Pass):
            def apply(self, supernet, batch):
                sizes.append(batch)
                supernet.activate(largest)

            def penalty(self):
                return (gate - 1).square().sum()

        return [Largest()]

    def learned(self, step, losses):
        self.told.append(losses)


def test_a_sampler_may_learn_and_is_kept_in_checkpoints(few, tmp_path):
    kept = tmp_path / "kept.safetensors"
    net, sampler, again = small(few), Gated(), Gated()
    history = train.train_supernet(net, few, PLAIN, 0, paths=sampler, checkpoint=kept)
    gate = sampler.module["gate"].item()
    assert gate == pytest.approx(2 * history[0]["lr"], rel=1e-5)  # one step of (gate - 1)^2 from 0
    assert sampler.told == [[pytest.approx(history[0]["loss"])]]
    assert sampler.sizes == [64]
    train.train_supernet(small(few, 5), few, PLAIN, 0, paths=again, checkpoint=kept)
    assert again.told == []  # nothing left to do
    assert again.module["gate"].item() == gate


def test_a_checkpoint_of_another_sampler_is_refused(few, tmp_path):
    kept = tmp_path / "kept.safetensors"
    train.train_supernet(small(few), few, PLAIN, 0, paths=Uniform(), checkpoint=kept)
    with pytest.raises(EspalierError, match="method was 'uniform', is 'fair'"):
        train.train_supernet(small(few), few, PLAIN, 0, paths=Fair(), checkpoint=kept)


def test_after_each_step_of_the_optimiser(few):
    net = small(few)
    before = net.stem[0].weight.detach().clone()
    seen = []
    train.train_supernet(
        net,
        few,
        Recipe(epochs=2, batch=32),
        0,
        paths=Uniform(),
        after_step=lambda e, s: seen.append((e, s, torch.equal(net.stem[0].weight, before))),
    )
    assert seen == [(0, 0, False), (0, 1, False), (1, 0, False), (1, 1, False)]


def test_draws_are_those_of_the_space():
    steps = drawn(Uniform(1), epoch=3, seed=7, steps=5)
    codes = SPACE.sample(5, np.random.default_rng([7, 3, 3]))
    assert [s[0].candidate for s in steps] == SPACE.decode(codes)


def test_cells_have_no_largest_to_teach_by() -> None:
    from espalier.train.supernet import default_paths

    cells = nets.make("nb201-supernet", (1, 8, 8), 10, channels=4, cells=1)
    sizes = nets.make("mobilenet", (1, 8, 8), 10)
    assert default_paths(cells, 1) == train.Uniform(3)
    assert default_paths(sizes, 1) == train.Sandwich(1)
