"""Single-Path NAS: one superkernel a layer, whose own weights say how much of it is needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from espalier import tasks
from espalier.costs import OnnxRuntime
from espalier.nets.multipath import MultiPath
from espalier.nets.superkernel import Superkernel
from espalier.recipes import Recipe
from espalier.recipes._parts.mobile import SMALL, Alone, Counted, Device, Processor
from espalier.solvers.relax import ExpectedCost, Settings, SingleLevel, Thresholds, relax
from espalier.solvers.relax.expected import Expected
from espalier.space import Candidate
from espalier.tasks import Task
from espalier.train import Recipe as Training
from espalier.train.seeds import global_seed

MOST_PARAMETERS = 1.1  # of the largest single network
NEAR = 0.05  # relative difference of latency that counts as the same


@dataclass(frozen=True)
class Setting:
    """The task, the device, the search, the weight of the latency, how many random networks."""

    source: str = "cifar10"
    size: int | None = 16
    train: int = 1500
    validation: int = 500
    test: int = 2000
    net: Mapping[str, Any] = field(default_factory=lambda: {"stem": 8, "widths": (8, 16, 32)})
    measured: bool = True  # else counted, and no number hangs on the machine
    latency: float = 0.2  # of the logarithm of the latency
    search: Settings = field(
        default_factory=lambda: Settings(
            epochs=12, lr=0.1, arch_lr=5e-3, arch_decay=0.0, warmup_epochs=3
        )
    )
    alone: Alone = field(default_factory=lambda: Alone(Training(epochs=8, lr=0.1)))
    found_times: int = 3  # trainings of the network that was found
    random: int = 9  # networks of the same latency
    rounds: int = 7  # of timing

    @property
    def task(self) -> Task:
        """The task, the same in every run."""
        return tasks.images(self.source, self.size, self.train, self.validation, self.test)

    def family(self, task: Task, multi: bool = False) -> MultiPath | Superkernel:
        """The space as one superkernel a layer, or as one operator for each choice."""
        kind = MultiPath if multi else Superkernel
        return kind(task.shape, task.classes, **self.net)


SCALES = {
    "smoke": Setting(
        "digits",
        None,
        train=128,
        validation=64,
        test=64,
        net=SMALL,
        measured=False,
        search=Settings(epochs=2, batch=32, arch_lr=0.05, arch_decay=0.0),
        alone=Alone(Training(epochs=1, batch=32)),
        found_times=1,
        random=2,
        rounds=1,
    ),
    "cpu": Setting(),
    "gpu": Setting(
        size=None,
        net={},
        train=45_000,
        validation=5_000,
        test=10_000,
        search=Settings(epochs=40, lr=0.1, arch_lr=3e-3, arch_decay=0.0, warmup_epochs=8),
        alone=Alone(Training(epochs=60)),
        found_times=5,
        random=20,
    ),
}


def run(scale: str, seed: int, out: Path | None) -> dict[str, Any]:
    """A search, and random networks of the same latency trained in the same way."""
    setting = SCALES[scale]
    task = setting.task
    supernet = fresh(task, setting, seed)
    device: Device = Processor(OnnxRuntime(), seed) if setting.measured else Counted()
    table = device.expected(supernet)
    found = relax(
        supernet,
        task,
        relaxation=Thresholds(),
        rule=SingleLevel(),
        terms=(ExpectedCost(table, form="log", coefficient=setting.latency, name="latency"),),
        settings=setting.search,
        seed=seed,
    )
    others = alike(supernet, table, found.candidate, setting.random, seed)
    timed = device.measured(supernet, [found.candidate, *others], setting.rounds)
    several = Alone(setting.alone.recipe, setting.found_times)
    own = several(supernet, found.candidate, task, seed)
    drawn = [
        {
            "candidate": candidate.to_json(),
            "table_ms": table.at(candidate),
            "latency_ms": ms,
            **setting.alone(supernet, candidate, task, seed),
        }
        for candidate, ms in zip(others, timed["ms"][1:], strict=True)
    ]
    kept = {
        "candidate": found.candidate.to_json(),
        "table_ms": table.at(found.candidate),
        "latency_ms": timed["ms"][0],
        **own,
    }
    about = device.about() if isinstance(device, Processor) else {}
    return {
        "device": {"name": device.name, **about},
        "timing": timed,
        "found": kept,
        "random": drawn,
        "monitor": found.monitor,
        "history": [
            {name: row[name] for name in ("epoch", "loss", "terms")} for row in found.history
        ],
        "seconds": found.seconds,
        "check": checked(setting, task, kept, drawn),
    }


def fresh(task: Task, setting: Setting, seed: int) -> Superkernel:
    """The supernet with weights decided by the seed."""
    with global_seed(seed):
        made = setting.family(task)
    assert isinstance(made, Superkernel)
    return made


def alike(
    family: Superkernel, table: Expected, found: Candidate, count: int, seed: int
) -> list[Candidate]:
    """Random networks whose latency is within `NEAR` of the found one's, by the table.

    The nearest, where there are not so many.
    """
    rng = np.random.default_rng([seed, 2])
    codes = family.space.sample(40 * count, rng)
    drawn = family.space.decode(codes[family.space.unique(codes)])
    wanted = table.at(found)
    off = [abs(table.at(candidate) / wanted - 1) for candidate in drawn]
    near = [c for c, share in zip(drawn, off, strict=True) if share <= NEAR and c != found]
    if len(near) >= count:
        return near[:count]
    order = np.argsort(off, kind="stable")
    return [drawn[i] for i in order if drawn[i] != found][:count]


def checked(
    setting: Setting, task: Task, found: dict[str, Any], drawn: list[dict[str, Any]]
) -> dict[str, Any]:
    """Parameters of the search, and the found network among random ones."""
    single, multi = setting.family(task), setting.family(task, multi=True)
    largest = _parameters(single.build(single.uniform(1.0)))
    share = _parameters(single) / largest
    middle = median(one["accuracy"] for one in drawn)
    slower = found["latency_ms"] / median(one["latency_ms"] for one in drawn)
    ahead = found["accuracy"] - middle
    return {
        "parameters_of_largest": share,
        "multi_path_parameters_of_largest": _parameters(multi) / largest,
        "accuracy": found["accuracy"],
        "median_of_random": middle,
        "ahead": ahead,
        "better_than": float(np.mean([one["accuracy"] < found["accuracy"] for one in drawn])),
        "latency_over_random": slower,
        "parameters_hold": share <= MOST_PARAMETERS,
        "holds": bool(share <= MOST_PARAMETERS and ahead > 0),
    }


def _parameters(network: Any) -> int:
    return sum(p.numel() for p in network.parameters())


RECIPE = Recipe(
    name="single-path-nas",
    title="Single-Path NAS: every choice inside one superkernel a layer",
    source="Stamoulis, Ding, Wang, Lymberopoulos, Priyantha, Liu & Marculescu, Single-Path NAS: "
    "Designing Hardware-Efficient ConvNets in less than 4 Hours (ECML PKDD 2019), "
    "https://arxiv.org/abs/1904.02877",
    parts=(
        "space: Superkernel, a kernel of 3 inside one of 5, an expansion of 3 inside one of 6, and "
        "layers that can be dropped",
        "relaxation: thresholds on the norms of the outer parts; indicators in forward, sigmoids in "
        "backward",
        "rule: one level, weights and thresholds on the same batch in one backward pass",
        "terms: 0.2 times the logarithm of the latency that the indicators make",
        "cost: a table of pieces measured in ONNX Runtime on one thread of this machine",
        "selection: what the indicators name; trained alone from fresh weights",
        "baseline: random networks of the same latency, trained alone in the same way",
    ),
    works_when="The search holds at most 1.1 times the parameters of the largest single network, and "
    "the network found has a higher test accuracy than the median of random networks whose latency "
    "is within 5% of its own by the table.",
    run=run,
    text="""
A layer's kernel of 5 is a kernel of 3 and a ring around it; its expansion of 6 is a first half of
channels and a second. Each outer part is used where its norm is above a threshold, and the layer as a
whole where its first part's is. Thresholds learn with the weights, by the sigmoid in the place of the
step; the latency of what the indicators name is looked up in the table of pieces, with the same
gradient. So the search is one training of the largest network, with a few numbers more.

What differs from the paper: norms are relative, that of an outer part to the part inside it and that
of a layer to fresh weights, because a batch norm follows the kernel and makes its scale meaningless.
The expansion is masked behind the depthwise convolution, so that a closed half still gets the
gradient that it would have if it were open. CIFAR-10 at 16x16 with 1,500 training images instead of
ImageNet, six layers instead of 22. The latency is a table by layer, as there.

Parameters of the multi-path supernet with the same choices stand beside: 2.55 times the largest network's, the
superkernels 1.0.

Five seeds at the scale cpu, each beside nine random networks of the same latency: the network found is ahead of their
median in four, by 1.4 points on average (-0.1 to 2.1), and better than 87% of them.
""",
)
