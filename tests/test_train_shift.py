"""Subnets on shares of a batch, and sampling by complexity with a generator that learns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from espalier import tasks, train
from espalier.errors import EspalierError, SpaceError
from espalier.nets.hierarchical import HierarchicalViT
from espalier.space import Forbid, Space, choice, integer, ordinal, real
from espalier.train import Recipe, loop
from espalier.train.generator import Generator, openness, straight
from espalier.train.onehot import candidates, one_hot, shares
from espalier.train.shift import Scale, Shift, Shifting
from espalier.train.together import Together, drawn


@pytest.fixture(scope="module")
def few():
    return tasks.make("digits:train=192,validation=150,test=100")


def small(task, seed=0):
    torch.manual_seed(seed)
    return HierarchicalViT(
        task.shape,
        task.classes,
        widths=[(8, 16), (16, 24)],
        heads=[(1, 2), (1, 2)],
        depth=(1, 2),
        ratio=(1, 2),
        patch=2,
    )


def summed(space):
    """A price: 100 and, for each decision, ten times the index of its option."""

    def price(weights):
        total = torch.full((len(next(iter(weights.values()))),), 100.0)
        for name in space.names:
            total = total + weights[name] @ (10.0 * torch.arange(space[name].count))
        return total

    return price


def same(a, b):
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


# --- candidates as rows ------------------------------------------------------------------------


def test_candidates_go_to_one_hot_rows_and_back():
    space = Space(
        [
            ordinal("width", 8, 16, 32),
            integer("depth", 2, 5),
            choice("kind", "a", "b", when={"depth": (2, 3)}),
        ]
    )
    chosen = space.decode(space.sample(40, np.random.default_rng(0)))
    rows = one_hot(space, chosen)
    assert {name: table.shape[1] for name, table in rows.items()} == {
        "width": 3,
        "depth": 4,
        "kind": 2,
    }
    assert all((table.sum(1) == 1).all() for table in rows.values())
    for i, candidate in enumerate(chosen):
        assert rows["depth"][i].argmax() == candidate["depth"] - 2
    assert candidates(space, rows) == chosen


def test_samples_share_candidates_in_runs():
    rows = {"d": torch.eye(3)}
    assert shares(rows, 8)["d"].argmax(1).tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert shares(rows, 2)["d"].argmax(1).tolist() == [0, 1]


# --- several subnets in a pass -----------------------------------------------------------------


def test_one_pass_has_the_gradients_of_each_subnet_on_its_share(few):
    net = small(few)
    x, y = next(iter(few.batches("train", 30)))
    paths = Together(subnets=3)
    paths.begin(net.space, 0, 1, 4, seed=5)
    (made,) = paths(2)
    made.apply(net, len(x))
    functional.cross_entropy(net(x), y).backward()
    together = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    net.zero_grad(set_to_none=True)
    chosen = candidates(net.space, made.rows)
    assert len(set(chosen)) == 3
    for i, candidate in enumerate(chosen):
        net.activate(candidate)
        own = slice(10 * i, 10 * i + 10)
        (functional.cross_entropy(net(x[own]), y[own]) / 3).backward()
    alone = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    assert alone.keys() <= together.keys()
    for name, gradient in together.items():
        expected = alone.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient, expected, atol=2e-6, rtol=1e-4, msg=name)


def test_all_subnets_learn_together(few):
    net = small(few)
    recipe = Recipe(epochs=8, batch=32, lr=0.1, precision="fp32")
    train.train_supernet(net, few, recipe, 0, paths=Together(4))
    assert net.active == net.uniform(1.0)
    for candidate in net.space.decode(net.space.sample(4, np.random.default_rng(1))):
        net.activate(candidate)
        assert train.evaluate(net, few, "validation")["accuracy"] > 0.5


def test_no_mixture_stays_where_the_largest_is_refused(few):
    net = small(few)
    most = {d.name: d.options[-1] for d in net.space.decisions}
    net.constraints = (Forbid(most),)
    net._forget()
    train.train_supernet(net, few, Recipe(epochs=1, batch=64), 0, paths=Together(4))
    assert net.active is not None
    x = torch.randn(3, *few.shape)  # of another size than what was mixed
    left = net(x)
    net.activate(net.active)
    assert torch.equal(left, net(x))


def test_only_wanted_candidates_are_drawn(few):
    space = small(few).space
    column = list(space.names).index("stage1.width")
    rng = np.random.default_rng(0)
    rows = drawn(space, 64, rng, lambda codes: codes[:, column] == 1)
    assert len(rows) == 64
    assert (rows[:, column] == 1).all()
    with pytest.raises(SpaceError, match="are wanted"):
        drawn(space, 8, rng, lambda codes: np.zeros(len(codes), bool))
    with pytest.raises(EspalierError, match="subnets is a whole number"):
        Together(0)
    with pytest.raises(SpaceError, match="'rate' is a real decision"):
        Together(2).begin(Space([real("rate", 0, 1)]), 0, 1, 2, 0)


# --- the generator -----------------------------------------------------------------------------


def test_choices_are_exactly_one_hot_and_learn_as_the_softmax_does():
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weights = torch.randn(5, 4)
    picked = straight(torch.softmax(logits, 1))
    assert torch.equal(picked.detach(), functional.one_hot(logits.argmax(1), 4).float())
    (got,) = torch.autograd.grad((picked * weights).sum(), logits)
    (expected,) = torch.autograd.grad((torch.softmax(logits, 1) * weights).sum(), logits)
    torch.testing.assert_close(got, expected)


def test_openness_is_one_where_all_options_are_as_likely():
    assert float(openness(torch.zeros(3, 5))) == pytest.approx(1)
    assert float(openness(torch.tensor([[50.0, 0.0]]))) == pytest.approx(0, abs=1e-6)
    half = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    bits = (-(0.25 * np.log2(0.25) + 0.75 * np.log2(0.75)) + 1) / 2
    assert float(openness(half.log())) == pytest.approx(bits)


def test_a_generator_refuses_what_has_no_options():
    with pytest.raises(SpaceError, match="'rate' is real"):
        Generator(Space([real("rate", 0.0, 1.0)]))


def test_the_generator_meets_targets():
    space = Space([ordinal(f"d{i}", *range(i % 2 + 2)) for i in range(8)])
    price = summed(space)
    trained = Shifting(space, price, Shift(warmup=80), seed=0)
    assert (trained.scale.low, trained.scale.high) == (100, 220)
    raw = Shifting(space, price, Shift(warmup=0), seed=0)
    targets = torch.linspace(0.1, 0.95, 9)
    with torch.no_grad():
        off, before = (
            float(s.scale.off(s.generator(targets), targets).mean()) for s in (trained, raw)
        )
    assert off < 0.08 < before
    found = trained.candidate(162, tries=24)
    assert abs(float(price(one_hot(space, [found]))) - 162) <= 10
    assert found == trained.candidate(162, tries=24)


def test_places_are_by_ratio():
    space = Space([ordinal(f"d{i}", *range(5)) for i in range(3)])
    scale = Scale(space, summed(space))
    assert scale.place(100 * 2.2**0.25) == pytest.approx(0.25)
    chosen = [{f"d{i}": 2 for i in range(3)}]
    rows = one_hot(space, chosen)
    assert float(scale.places(rows)) == pytest.approx(np.log(1.6) / np.log(2.2))
    half = torch.tensor([0.5])
    target = 100 * 2.2**0.5
    assert float(scale.off(rows, half)) == pytest.approx(abs(160 - target) / target, rel=1e-5)


def test_the_loss_of_the_network_reaches_the_generator(few):
    net = small(few)
    paths = Shifting(net.space, summed(net.space), Shift(off=0.0, open=0.0, warmup=0), seed=0)
    paths.begin(net.space, 0, 1, 1, seed=0)
    (made,) = paths(0)
    x, y = next(iter(few.batches("train", 16)))
    made.apply(net, len(x))
    functional.cross_entropy(net(x), y).backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in paths.generator.head[0].parameters())
    expected = net(x).detach()
    net.activate(candidates(net.space, {k: v[:1] for k, v in made.choices.items()})[0])
    torch.testing.assert_close(net(x).detach(), expected)


def test_bins_whose_loss_fell_more_become_likelier(few):
    space = small(few).space
    paths = Shifting(space, summed(space), Shift(bins=3, warmup=0, sharpness=1.0), seed=0)
    memory = paths.module
    for index, loss in enumerate((2.0, 2.0, 2.0)):
        memory.note(index, loss)
    memory.shift(1.0)
    assert memory.probabilities.tolist() == pytest.approx([1 / 3] * 3)  # nothing to compare with
    for index, loss in enumerate((1.9, 1.5, 1.0)):
        memory.note(index, loss - 0.1)
        memory.note(index, loss + 0.1)
    memory.shift(1.0)
    score = np.exp([0.1, 0.5, 1.0])
    assert memory.probabilities.tolist() == pytest.approx((score / score.sum()).tolist(), rel=1e-4)
    memory.shift(1.0)  # no bin was drawn since: none fell, none is preferred
    assert memory.probabilities.tolist() == pytest.approx([1 / 3] * 3)


def test_a_price_must_grow():
    space = Space([ordinal("width", 8, 16), ordinal("depth", 1, 2)])
    with pytest.raises(EspalierError, match="cheapest option of each decision first"):
        Scale(space, lambda weights: 300.0 - summed(space)(weights))


@pytest.mark.parametrize("wrong", [{"bins": 1}, {"every": 0}, {"temperature": 0.0}])
def test_a_shift_checks_its_settings(wrong):
    with pytest.raises(EspalierError, match=f"{next(iter(wrong))} of a shift must be"):
        Shift(**wrong)


class _Stopped(Exception):
    pass


def test_a_resumed_shift_is_the_same_to_the_bit(few, tmp_path, monkeypatch):
    recipe = Recipe(epochs=4, batch=64, lr=0.05, precision="fp32")

    def shifted(checkpoint=None, stop=None):
        net = small(few)
        paths = Shifting(net.space, summed(net.space), Shift(bins=3, every=1, warmup=5), seed=3)

        def progress(done, total, text):
            if done == stop:
                raise _Stopped

        train.train_supernet(
            net, few, recipe, 3, paths=paths, checkpoint=checkpoint, progress=progress
        )
        return net, paths

    net, paths = shifted()
    assert [row["epoch"] for row in paths.history] == [1, 2, 3, 4]
    assert paths.history[-1]["probabilities"] != paths.history[0]["probabilities"]
    monkeypatch.setattr(loop, "_SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    with pytest.raises(_Stopped):
        shifted(tmp_path / "c.safetensors", stop=2)
    again, resumed = shifted(tmp_path / "c.safetensors")
    assert same(net, again)
    assert same(paths.generator, resumed.generator)
    assert same(paths.module, resumed.module)
