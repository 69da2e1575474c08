"""The search itself: on digits, on a supernet of three operators and a depth."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch import nn

from espalier import space as sp
from espalier import tasks
from espalier.errors import EspalierError, SpaceError, StudyError
from espalier.nets import elastic
from espalier.nets.supernet import Supernet
from espalier.solvers import relax as rx
from espalier.solvers.relax import (
    BinaryGates,
    EdgeNormalised,
    Entropy,
    ExpectedCost,
    FirstOrder,
    Gumbel,
    Magnitude,
    MaxWeight,
    Rarts,
    SecondOrder,
    SelfDistillation,
    Settings,
    SingleLevel,
    Softmax,
    assemble,
    relax,
)
from espalier.solvers.relax.collapse import without_weights
from espalier.space import Candidate
from espalier.train.loop import Diverged
from espalier.train.schedules import linear

OPERATORS = ("skip", "blind", "conv")


def block(width: int, kernel: int) -> nn.Sequential:
    conv = nn.Conv2d(width, width, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU())


class Blind(nn.Module):
    """Loses everything about the image, so a search must not choose it."""

    def forward(self, x):
        return x * 0.0


class Tiny(Supernet):
    """Two edges in a row, each of which skips, forgets or convolves, and a deeper tail."""

    joins: ClassVar = {"out": ("first", "second")}

    def __init__(self, width: int = 6):
        super().__init__((1, 8, 8), 10)
        conv = nn.Conv2d(1, width, 3, 2, 1, bias=False)
        self.stem = nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU())
        for name in self.joins["out"]:
            made = {"skip": nn.Identity(), "blind": Blind(), "conv": block(width, 3)}
            setattr(self, name, elastic.OneOf(sp.choice(name, *OPERATORS), made))
        self.tail = elastic.Repeat(sp.ordinal("depth", 0, 1), lambda _: block(width, 1))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(16 * width, 10))


def digits():
    return tasks.images("digits", train=400, validation=200)


def tiny(seed: int = 0) -> Tiny:
    torch.manual_seed(seed)
    return Tiny()


QUICK = Settings(epochs=2, batch=50, lr=0.1, arch_lr=0.1, precision="fp32")


def test_it_learns_and_avoids_what_forgets():
    # long and gentle enough that another processor's rounding does not decide
    net = tiny()
    found = relax(net, digits(), settings=Settings(epochs=10, batch=20, lr=0.03, arch_lr=0.05))
    assert found.candidate["first"] != "blind"
    assert found.candidate["second"] != "blind"
    assert net.active == found.candidate
    assert not net.training
    rows = found.history
    assert [row["epoch"] for row in rows] == list(range(1, 11))
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["arch_loss"] < rows[0]["arch_loss"]
    assert rows[-1]["entropy"] < rows[0]["entropy"]
    for name, p in found.probabilities.items():
        assert sum(p) == pytest.approx(1.0, abs=1e-5)
        best = net.space[name].options[max(range(len(p)), key=p.__getitem__)]
        assert found.candidate[name] == best
        assert rows[-1]["probabilities"][name] == pytest.approx(p)
    assert found.monitor["supernet_accuracy"] > 0.5
    assert found.monitor["gap"] == pytest.approx(
        found.monitor["supernet_accuracy"] - found.monitor["derived_accuracy"]
    )
    assert json.loads(json.dumps(found.to_json()))["candidate"] == found.candidate.to_json()


def test_the_rate_of_the_weights_follows_its_schedule():
    found = relax(tiny(), digits(), settings=QUICK)
    # 200 images are 4 steps an epoch; the last of 8 is at 7/8 of the way
    assert found.history[-1]["lr"] == pytest.approx(QUICK.rate(7 / 8))
    assert QUICK.rate(0.0) == pytest.approx(0.1)
    assert QUICK.rate(1.0) == pytest.approx(0.001)


def test_a_warm_up_leaves_the_architecture():
    settings = Settings(epochs=2, batch=50, arch_lr=0.1, warmup_epochs=1, precision="fp32")
    found = relax(tiny(), digits(), settings=settings)
    first, second = found.history
    assert first["arch_loss"] is None
    assert second["arch_loss"] is not None
    assert all(max(p) - min(p) < 5e-3 for p in first["probabilities"].values())
    assert any(max(p) - min(p) > 2e-2 for p in second["probabilities"].values())


SEARCHES = {
    "darts": {},
    "second order": {"rule": SecondOrder()},
    "rarts, distilled": {"rule": Rarts(), "terms": [SelfDistillation(2)]},
    "gdas": {"relaxation": Gumbel(2.0, hard=True)},
    "proxyless": {"relaxation": BinaryGates(), "terms": [Entropy(0.1)]},
    "edges, one level": {"relaxation": EdgeNormalised(MaxWeight()), "rule": SingleLevel()},
}


class Killed(Exception):
    pass


@pytest.mark.parametrize("search", SEARCHES)
def test_killed_and_resumed_it_ends_in_the_same_bits(search, tmp_path):
    def run(net, **more):
        slots = {**SEARCHES[search], "settings": QUICK, "seed": 3}
        return relax(net, digits(), **slots, **more)

    def kill(done, of, text):
        raise Killed

    whole, net = tiny(), tiny()
    wanted = run(whole)
    path = tmp_path / "search.safetensors"
    with pytest.raises(Killed):
        run(net, checkpoint=path, progress=kill)
    other = tiny(seed=9)  # its weights are not those that the search began with
    found = run(other, checkpoint=path)
    assert found.history == wanted.history
    assert found.candidate == wanted.candidate
    assert found.monitor == wanted.monitor
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_no_mixture_stays_when_a_search_ends_early():
    def kill(done, of, text):
        raise Killed

    net, x = tiny(), torch.randn(3, 1, 8, 8)
    with pytest.raises(Killed):
        relax(net, digits(), settings=QUICK, progress=kill)
    left = net.eval()(x)
    net.activate(net.active)
    assert torch.equal(left, net(x))


def test_a_selection_that_tunes_gives_the_same_whatever_was_drawn_before():
    ends = []

    def select(state):
        state.tune(state.base)
        ends.append(state.supernet.head[2].weight.detach().clone())
        return state.base

    for before in (1, 2):
        net = tiny()
        net.head.insert(1, nn.Dropout(0.5))
        torch.manual_seed(before)
        relax(net, digits(), settings=replace(QUICK, epochs=1), selection=select)
    assert torch.equal(*ends)


@pytest.mark.parametrize(
    ("rule", "precision", "wanted"),
    [
        (FirstOrder(), "auto", "bf16"),
        (SecondOrder(), "auto", "fp32"),
        (SecondOrder(), "bf16", "bf16"),
    ],
    ids=str,
)
def test_differences_of_gradients_are_taken_in_full_precision(monkeypatch, rule, precision, wanted):
    monkeypatch.setattr("espalier.train.precision._computes_bf16", lambda device: True)
    seen = []
    settings = Settings(epochs=1, batch=150, precision=precision)
    relax(
        tiny(),
        digits(),
        rule=rule,
        settings=settings,
        selection=lambda state: seen.append(state.precision) or state.base,
    )
    assert seen == [wanted]


def test_a_step_ahead_and_its_differences_are_of_one_sample_and_one_loss():
    told, terms = [], []

    class Watched(Gumbel):
        def weights(self, logits, moment):
            if moment.generator is not None:
                told.append(moment.generator.initial_seed())
            return super().weights(logits, moment)

    class Noted(Entropy):
        on = "weights"

        def __call__(self, moment, state):
            terms.append(len(told))
            return super().__call__(moment, state)

    settings = Settings(epochs=1, batch=200, precision="fp32")
    relax(
        tiny(),
        digits(),
        relaxation=Watched(),
        rule=SecondOrder(),
        terms=[Noted()],
        settings=settings,
    )
    ahead, validation, plus, minus, own = told
    assert ahead == validation == plus == minus != own
    assert terms == [1, 3, 4, 5]  # on every loss of train


def test_a_checkpoint_of_another_search_is_refused(tmp_path):
    path = tmp_path / "search.safetensors"
    settings = Settings(epochs=1, batch=50, precision="fp32")
    relax(tiny(), digits(), settings=settings, checkpoint=path)
    with pytest.raises(StudyError, match="relaxation"):
        relax(tiny(), digits(), settings=settings, checkpoint=path, relaxation=Softmax(2.0))
    with pytest.raises(StudyError, match="terms"):
        relax(tiny(), digits(), settings=settings, checkpoint=path, terms=[Entropy()])


def test_test_is_not_read_and_the_halves_are_kept_apart():
    class Watched(tasks.ImageTask):
        seen: ClassVar[list] = []

        def batches(self, split, *args, **named):
            assert split != "test"
            self.seen.append((split, self.size("train")))
            return super().batches(split, *args, **named)

    task = digits()
    task.__class__ = Watched
    relax(tiny(), task, settings=Settings(epochs=1, batch=50, arch_share=0.2, precision="fp32"))
    sizes = {size for split, size in Watched.seen if split == "train"}
    assert sizes == {320, 80}


def test_expected_cost_pulls_to_the_cheap_option():
    def cost(p):
        return p["depth"][1] + p["first"][2] + p["second"][2]

    dear = ExpectedCost(cost, coefficient=20.0)
    settings = Settings(epochs=2, batch=20, arch_lr=0.1, precision="fp32")
    found = relax(tiny(), digits(), terms=[dear], settings=settings)
    assert found.candidate["depth"] == 0
    assert "conv" not in (found.candidate["first"], found.candidate["second"])
    assert found.history[0]["terms"]["cost"] > found.history[1]["terms"]["cost"] > 0


def test_it_stops_when_it_has_collapsed():
    def cost(p):
        return p["first"][2] + p["second"][2]

    settings = Settings(epochs=5, batch=20, arch_lr=0.1, precision="fp32")
    terms = [ExpectedCost(cost, coefficient=20.0)]
    found = relax(tiny(), digits(), terms=terms, settings=settings, stop_when_collapsed=2)
    assert found.history[-1]["parameterless"] == 2
    assert all(row["parameterless"] < 2 for row in found.history[:-1])
    assert len(found.history) < 5
    assert found.monitor["epochs"] == len(found.history)


def test_only_named_decisions_move():
    net = tiny()
    net.activate(Candidate({"first": "conv", "second": "skip", "depth": 0}))
    found = relax(net, digits(), names=["first"], settings=QUICK)
    assert set(found.probabilities) == {"first"}
    assert found.candidate["second"] == "skip"
    assert found.candidate["depth"] == 0
    with pytest.raises(SpaceError, match="width"):
        relax(net, digits(), names=["width"], settings=QUICK)


def test_a_search_that_diverges_says_where():
    net = tiny()
    with torch.no_grad():
        net.head[1].bias[0] = float("nan")
    with pytest.raises(Diverged, match="epoch 1, step 1"):
        relax(net, digits(), settings=QUICK)
    with pytest.raises(Diverged, match="arch_lr"):
        relax(net, digits(), settings=QUICK, relaxation=BinaryGates())


def test_options_without_weights_are_found_in_the_modules():
    assert without_weights(tiny(), ("first", "second", "depth")) == {
        "first": frozenset({0, 1}),
        "second": frozenset({0, 1}),
    }


def test_the_edges_of_a_node_are_its_strongest():
    """A decision that wakes others takes the option whose edges score best, as in DARTS."""
    names = ("from0", "from1", "from2")
    pairs = {"0-1": (0, 1), "0-2": (0, 2), "1-2": (1, 2)}
    wakes = {
        name: tuple(p for p, both in pairs.items() if i in both) for i, name in enumerate(names)
    }
    space = sp.Space(
        [
            sp.choice("inputs", *pairs),
            *(
                sp.choice(name, "none", "skip", "conv", when={"inputs": wakes[name]})
                for name in names
            ),
        ]
    )
    scores = {
        "from0": torch.tensor([0.1, 0.5, 0.4]),
        "from1": torch.tensor([0.6, 0.1, 0.3]),
        "from2": torch.tensor([0.1, 0.1, 0.8]),
    }
    found = assemble(space, scores, {})
    assert found.to_json() == {"inputs": "1-2", "from1": "none", "from2": "conv"}
    weak = {"from1": torch.tensor(0.1)}
    assert assemble(space, scores, {}, weak)["inputs"] == "0-2"
    without = {n: s * torch.tensor([0.0, 1.0, 1.0]) for n, s in scores.items()}  # 0.5, 0.3, 0.8
    assert assemble(space, without, {}).to_json() == {
        "inputs": "0-2",
        "from0": "skip",
        "from2": "conv",
    }


def test_magnitude_passes_over_options():
    found = relax(
        tiny(),
        digits(),
        rule=FirstOrder(),
        selection=Magnitude(without=("conv", "blind")),
        settings=Settings(epochs=1, batch=50, precision="fp32"),
    )
    assert found.candidate["first"] == found.candidate["second"] == "skip"


def test_settings_out_of_range_are_refused():
    for bad in ({"epochs": 0}, {"arch_share": 1.0}, {"lr_min": 1.0}, {"precision": "fp8"}):
        with pytest.raises(EspalierError, match=next(iter(bad))):
            Settings(**bad)


@pytest.mark.parametrize(
    ("slots", "text"),
    [
        ({"relaxation": Gumbel}, "relaxation of relax takes objects such as Softmax"),
        ({"rule": "rarts"}, "rule of relax"),
        ({"terms": [lambda moment, state: 0.0]}, "terms of relax"),
        ({"selection": Magnitude}, "selection of relax"),
        ({"selection": "magnitude"}, "selection of relax"),
        ({"settings": {"epochs": 1}}, "settings of relax"),
        ({"relaxation": Softmax(linear(1, -1))}, "temperature must stay above 0, at 50%"),
        ({"relaxation": Gumbel(0.0)}, "temperature must stay above 0, at 0%"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_slots_that_make_no_sense_are_refused_at_once(slots, text):
    def told(done, of, line):
        raise AssertionError("the search has begun")

    progress = told if "of relax" in text else None
    with pytest.raises(EspalierError, match=text):
        relax(tiny(), digits(), **{"settings": QUICK, "progress": progress, **slots})


def test_what_can_not_be_relaxed_is_refused(monkeypatch):
    with pytest.raises(SpaceError, match="needs a supernet that can run mixtures, got Linear"):
        relax(nn.Linear(2, 2), digits(), settings=QUICK)
    with pytest.raises(EspalierError, match="stop_when_collapsed is 1 or more"):
        relax(tiny(), digits(), stop_when_collapsed=0)
    with monkeypatch.context() as several:
        several.setattr("espalier.train.distributed.ranks", lambda: 2)
        with pytest.raises(EspalierError, match="in one process, and 2 are in the group"):
            relax(tiny(), digits())
    with pytest.raises(EspalierError, match="epsilon above 0"):
        SecondOrder(epsilon=0.0)
    with pytest.raises(EspalierError, match="pull from 0"):
        Rarts(pull=-1.0)


def test_every_name_of_the_package_is_there():
    for name in rx.__all__:
        assert getattr(rx, name) is not None
    with pytest.raises(AttributeError):
        rx.nothing  # noqa: B018
