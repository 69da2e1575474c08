"""Training one network: learns, repeats itself, resumes to the same bits, refuses nonsense."""

import dataclasses

import pytest
import torch
from torch import nn

from espalier import tasks, train
from espalier.errors import EspalierError, StudyError
from espalier.train import Recipe, loop, losses, optimiser


@pytest.fixture(scope="module")
def digits():
    return tasks.make("digits")


@pytest.fixture(scope="module")
def few():
    return tasks.make("digits:train=200,validation=100,test=100")


@pytest.fixture(autouse=True)
def every_epoch(monkeypatch):
    monkeypatch.setattr(loop, "_SECONDS_BETWEEN_CHECKPOINTS", 0.0)


def network(width=8, seed=0, dropout=0.0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 5, 2, 2, groups=width, bias=False),
        nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 10),
    )


def same(a, b):
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


class Stop(Exception):
    pass


def stop_after(epochs):
    def progress(done, total, text):
        if done == epochs:
            raise Stop

    return progress


def test_the_default_recipe_learns_digits(digits):
    net = network(16)
    history = train.fit(net, digits, Recipe(epochs=15), seed=0)
    assert train.evaluate(net, digits, "validation")["accuracy"] >= 0.975
    assert history[-1]["loss"] < history[0]["loss"] / 4
    assert [row["epoch"] for row in history] == list(range(1, 16))
    assert not net.training
    maps = [p for p in net.parameters() if p.ndim == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in maps)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_same_seed_same_bits_other_seed_other_bits(few, precision):
    recipe = Recipe(epochs=2, precision=precision)
    nets = [network(dropout=0.2) for _ in range(3)]
    for net, seed in zip(nets, (1, 1, 2), strict=True):
        train.fit(net, few, recipe, seed)
    assert same(nets[0], nets[1])
    assert not same(nets[0], nets[2])


def test_the_global_generator_is_left_alone(few):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10))
    torch.manual_seed(5)
    train.fit(net, few, Recipe(epochs=1), seed=0)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stopped", [1, 3])
def test_a_stopped_training_resumes_to_the_same_bits(few, tmp_path, precision, stopped):
    recipe = Recipe(epochs=4, precision=precision)
    whole, parts, fresh = (network(dropout=0.2) for _ in range(3))
    expected = train.fit(whole, few, recipe, seed=7)
    path = tmp_path / "weights.partial"
    with pytest.raises(Stop):
        train.fit(parts, few, recipe, seed=7, checkpoint=path, progress=stop_after(stopped))
    seen = []
    history = train.fit(
        fresh, few, recipe, 7, checkpoint=path, progress=lambda done, *_: seen.append(done)
    )
    assert seen == list(range(stopped + 1, 5))
    assert history == expected
    assert same(fresh, whole)
    assert [p.name for p in tmp_path.iterdir()] == ["weights.partial"]


def test_a_finished_training_is_read_not_repeated(few, tmp_path):
    path = tmp_path / "done"
    first, second = network(), network(seed=9)
    train.fit(first, few, Recipe(epochs=1), 0, checkpoint=path)
    train.fit(second, few, Recipe(epochs=1), 0, checkpoint=path, progress=stop_after(1))
    assert same(first, second)


def test_a_checkpoint_of_another_training_is_refused(few, tmp_path):
    path = tmp_path / "weights"
    train.fit(network(), few, Recipe(epochs=1), 0, checkpoint=path)
    before = path.read_bytes()
    with pytest.raises(StudyError, match=r"seed was 0, is 1"):
        train.fit(network(), few, Recipe(epochs=1), 1, checkpoint=path)
    with pytest.raises(StudyError, match=r"lr was 0.2, is 0.1"):
        train.fit(network(), few, Recipe(epochs=1, lr=0.1), 0, checkpoint=path)
    with pytest.raises(StudyError, match="weights was"):
        train.fit(network(12), few, Recipe(epochs=1), 0, checkpoint=path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"no tensors", None])
def test_a_broken_checkpoint_is_refused_and_kept(few, tmp_path, content):
    path = tmp_path / "weights"
    train.fit(network(), few, Recipe(epochs=1), 0, checkpoint=path)
    broken = path.read_bytes()[:-50] if content is None else content
    path.write_bytes(broken)
    with pytest.raises(StudyError, match="not a checkpoint"):
        train.fit(network(), few, Recipe(epochs=1), 0, checkpoint=path)
    assert path.read_bytes() == broken


def test_a_checkpoint_that_can_not_be_written_says_so(few, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StudyError, match="can't write the checkpoint"):
        train.fit(network(), few, Recipe(epochs=1), 0, checkpoint=tmp_path / "file" / "weights")


def test_a_diverging_loss_is_a_clear_error(few):
    with pytest.raises(train.Diverged, match="lower the learning rate"):
        train.fit(network(), few, Recipe(epochs=30, lr=1e30, warmup=0, clip=1e30), 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("batch", 1),
        ("lr", 0.0),
        ("momentum", 1.0),
        ("warmup", 1.0),
        ("label_smoothing", -0.1),
        ("distil", 1.5),
        ("clip", 0.0),
        ("precision", "fp8"),
    ],
)
def test_a_recipe_out_of_range_is_refused(name, value):
    with pytest.raises(EspalierError, match=rf"{name} of a recipe must be .*got {value!r}"):
        dataclasses.replace(Recipe(), **{name: value})


def test_the_rate_rises_then_falls_to_almost_nothing():
    recipe = Recipe(lr=0.2, warmup=0.1)
    rates = [optimiser.rate(recipe, i, 100) for i in range(100)]
    assert rates[:10] == pytest.approx([0.02 * (i + 1) for i in range(10)])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert 0 < rates[-1] < 1e-3
    assert optimiser.rate(Recipe(lr=0.2, warmup=0.0), 0, 100) == pytest.approx(0.2, rel=1e-3)


def test_biases_and_norms_do_not_decay():
    groups = optimiser.make(network(), Recipe(weight_decay=0.1)).param_groups
    assert {p.ndim > 1 for p in groups[0]["params"]} == {True}
    assert {p.ndim > 1 for p in groups[1]["params"]} == {False}
    assert (groups[0]["weight_decay"], groups[1]["weight_decay"]) == (0.1, 0.0)


def test_label_smoothing_is_that_of_torch(few):
    outputs, targets = torch.randn(20, 10), torch.randint(10, (20,))
    expected = nn.functional.cross_entropy(outputs, targets, label_smoothing=0.1)
    assert losses.hard(few, outputs, targets, 0.1) == pytest.approx(float(expected), rel=1e-5)
    with pytest.raises(EspalierError, match="class labels"):
        losses.hard(few, outputs, torch.rand(20, 10), 0.1)


def test_distillation_is_least_at_the_teachers_outputs():
    teacher, labels = torch.randn(20, 10), torch.randint(10, (20,))
    at = losses.soft(teacher, teacher, labels)
    entropy = torch.distributions.Categorical(logits=teacher).entropy().mean()
    assert float(at) == pytest.approx(float(entropy), rel=1e-5)
    assert losses.soft(teacher + torch.randn(20, 10), teacher, labels) > at
    assert losses.soft(teacher, teacher, torch.rand(20)) == 0


def test_a_student_of_a_teacher_learns_its_outputs_and_leaves_it_alone(few):
    teacher = network()
    train.fit(teacher, few, Recipe(epochs=10, batch=20), seed=0)
    statistics = teacher[1].running_mean.clone()
    # a teacher that calls every digit by the next one's name
    with torch.no_grad():
        teacher[-1].weight.copy_(teacher[-1].weight.roll(1, 0))
        teacher[-1].bias.copy_(teacher[-1].bias.roll(1, 0))
    student = network(seed=1)
    train.fit(student, few, Recipe(epochs=10, batch=20, distil=1.0), seed=0, teacher=teacher)
    x, y = next(few.batches("validation", 100))
    with torch.no_grad():
        learnt = student(x).argmax(1)
    assert float((learnt == (y + 1) % 10).float().mean()) > 0.7
    assert torch.equal(statistics, teacher[1].running_mean)


def test_frozen_weights_stay(few):
    net = network()
    net[0].weight.requires_grad_(False)
    before = net[0].weight.clone()
    train.fit(net, few, Recipe(epochs=1), 0)
    assert torch.equal(net[0].weight, before)
