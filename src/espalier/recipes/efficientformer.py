"""EfficientFormer: a supernet slimmed step by step until it meets a measured latency."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from espalier import tasks
from espalier.costs import Counts, PredictedLatency
from espalier.nets.metapath import ATTENTION, IDENTITY, POOL, MetaPath
from espalier.recipes import Recipe
from espalier.recipes._measured import (
    Clock,
    Counted,
    Processor,
    even,
    params,
    sample,
    trained,
    widest,
)
from espalier.solvers.relax import Gumbel, Settings, SingleLevel, relax
from espalier.space import Candidate, Space
from espalier.train import Recipe as Training
from espalier.train.schedules import exponential
from espalier.train.seeds import global_seed

NEAR = 0.1  # how far below the target a measured latency counts as met
_ROUNDS = 12  # of correcting the table by what is measured
Codes = NDArray[Any]
Milliseconds = Callable[[Codes], NDArray[np.float64]]


@dataclass(frozen=True)
class Plan:
    """Data, the supernet and its training, the target, the training of what is found."""

    task: str = "cifar10:size=16,train=2000,validation=500,test=4000"
    net: Mapping[str, Any] = field(
        default_factory=lambda: {"widths": [(16, 32), (32, 48, 64), (64, 80, 96, 112, 128)]}
    )
    search: Settings = field(
        default_factory=lambda: Settings(epochs=8, lr=0.05, arch_lr=0.03, arch_decay=0.0)
    )
    multiple: int = 16  # of uniform widths: what the runtime's kernels like
    target: float = 0.55  # of the largest network's latency
    training: Training = field(default_factory=lambda: Training(epochs=14, lr=0.1))
    times: int = 1
    pieces: int = 60  # measured ones of the latency table; 0: everything by formula
    rounds: int = 9
    steps: int = 40  # scales of the uniform ones that are tried


PLANS = {
    "smoke": Plan(
        "digits:train=128,validation=64,test=100",
        {"widths": [(4, 8), (8, 12, 16), (16, 24)], "heads": 2},
        Settings(epochs=1, batch=64, arch_lr=0.3, arch_decay=0.0),
        4,
        0.6,
        Training(epochs=1, batch=32),
        pieces=0,
        steps=8,
    ),
    "cpu": Plan(),
    "gpu": Plan(
        "cifar10",
        {
            "depth": 4,
            "expansion": 4,
            "widths": [(32, 48, 64), (64, 96, 128), (128, 160, 192, 224, 256)],
        },
        Settings(epochs=100, lr=0.05, arch_lr=3e-3, arch_decay=0.0),
        training=Training(epochs=200, lr=0.1),
        pieces=250,
    ),
}


class Slimming:
    """Goes down from the largest network, by the least importance lost for a millisecond saved.

    `chances`: of each operator, by decision. The importance of a block is the chance of its operator
    over that of "identity"; that of a stage is the sum over its blocks. Three actions: drop the least
    important block, turn the first attention into a pool, take a step of width off the least
    important stage, which loses that share of its importance.
    """

    def __init__(
        self, space: Space, chances: Mapping[str, list[float]], price: Milliseconds
    ) -> None:
        self.space, self.price = space, price
        self.importance = {
            name: {
                o: p / found[0]
                for o, p in zip(_options(space, name), found, strict=True)
                if o != IDENTITY
            }
            for name, found in chances.items()
        }

    def path(self) -> Iterator[dict[str, Any]]:
        """Each network gone through, from the largest to the smallest: `codes`, `ms`, `action`."""
        row, action = self.space.corner(True), "the largest"
        while True:
            ms = float(self.price(row)[0])
            yield {"codes": row, "ms": ms, "action": action}
            actions = list(self._actions(self.space.decode(row)[0]))
            rows = [self.space.encode([self.space.candidate(other)]) for _, other, _ in actions]
            saved = [ms - float(self.price(r)[0]) for r in rows]
            able = [i for i, s in enumerate(saved) if s > 0]
            if not able:
                return
            best = min(able, key=lambda i: actions[i][2] / saved[i])
            row, action = rows[best], actions[best][0]

    def _actions(self, now: Candidate) -> Iterator[tuple[str, dict[str, Any], float]]:
        """What may be done: its name, the network then, the importance that is lost."""
        worth = {n: v.get(now[n], 0.0) for n, v in self.importance.items()}
        runs = [n for n, value in worth.items() if now[n] != IDENTITY]
        if runs:
            least = min(runs, key=worth.__getitem__)
            yield f"drop {least}", {**now, least: IDENTITY}, worth[least]
        first = next((n for n in runs if now[n] == ATTENTION), None)
        if first is not None:
            lost = max(0.0, worth[first] - self.importance[first][POOL])
            yield f"pool {first}", {**now, first: POOL}, lost
        stages = {
            n: sum(worth[b] for b in runs if _stage(b) == _stage(n)) for n in self._widths(now)
        }
        if stages:
            width = min(stages, key=stages.__getitem__)
            options = _options(self.space, width)
            smaller = options[options.index(now[width]) - 1]
            lost = stages[width] * (1 - int(smaller) / int(now[width]))
            yield f"shrink {width} to {smaller}", {**now, width: smaller}, lost

    def _widths(self, now: Candidate) -> list[str]:
        """Widths that can be smaller."""
        names = [n for n in self.space.names if n.endswith(".width")]
        return [n for n in names if now[n] != _options(self.space, n)[0]]


def _options(space: Space, name: str) -> tuple[Any, ...]:
    return tuple(space[name].options)


def _stage(name: str) -> str:
    return name.partition(".")[0]


def met(
    slim: Slimming,
    build: Callable[[Candidate], nn.Module],
    most: float,
    measure: Callable[[nn.Module], float],
) -> dict[str, Any]:
    """The first network on the way whose measured share of the largest's latency is at most `most`.

    The table says where to look; what is measured corrects it, until the step before is too slow.
    """
    steps = list(slim.path())
    known: dict[int, float] = {}

    def share(step: int) -> float:
        if step not in known:
            known[step] = measure(build(slim.space.decode(steps[step]["codes"])[0]))
        return known[step]

    largest = steps[0]["ms"]
    at = next((i for i, s in enumerate(steps) if s["ms"] <= most * largest), len(steps) - 1)
    for _ in range(_ROUNDS):
        if share(at) > most and at + 1 < len(steps):
            at += 1
        elif at > 0 and share(at) <= most and share(at - 1) <= most:
            at -= 1
        else:
            break
    return {
        "candidate": slim.space.decode(steps[at]["codes"])[0],
        "share": share(at),
        "predicted": steps[at]["ms"] / largest,
        "actions": [s["action"] for s in steps[1 : at + 1]],
        "measured": len(known),
    }


def run(scale: str, seed: int, out: Path | None) -> dict[str, Any]:
    """Trains the supernet, slims it to the target, trains what is found beside uniform widths."""
    plan = PLANS[scale]
    task = tasks.make(plan.task, seed)
    with global_seed(seed):
        net = MetaPath(task.shape, task.classes, **plan.net)
    blocks = [name for name in net.space.names if name.endswith(".op")]
    searched = relax(
        net,
        task,
        relaxation=Gumbel(exponential(5.0, 0.1 ** (1 / plan.search.epochs), plan.search.epochs)),
        rule=SingleLevel(),
        names=blocks,
        settings=plan.search,
        seed=seed,
    )
    clock: Clock = Counted()
    if plan.pieces:
        clock = Processor(rounds=plan.rounds, seed=seed)
        table = PredictedLatency(net)
        table.calibrate(seed, limit=plan.pieces)
        price: Milliseconds = lambda codes: table.estimate_codes(codes)["latency_ms"]  # noqa: E731
    else:
        price = lambda codes: Counts(net).estimate_codes(codes)["macs"] / 1e6  # noqa: E731
    x, largest = sample(task), net.build(net.uniform(1.0))
    slim = Slimming(net.space, searched.probabilities, price)
    found = met(slim, net.build, plan.target, lambda n: clock.ratio(n, largest, x))

    def uniform(scale: float) -> nn.Module:
        widths = [even(scale * max(options), plan.multiple) for options in plan.net["widths"]]
        fixed = MetaPath(task.shape, task.classes, **{**plan.net, "widths": widths, "fixed": True})
        return fixed.build(fixed.uniform(1.0))

    scales = [s / plan.steps for s in range(plan.steps // 6, plan.steps + 1)]
    scale_found, share = widest(uniform, scales, found["share"], largest, clock, x)
    rows: dict[str, dict[str, Any]] = {}
    makes: dict[str, Callable[[], nn.Module]] = {
        "slimmed": partial(net.build, found["candidate"]),
        "uniform": partial(uniform, scale_found),
    }
    for name, make in makes.items():
        made, result = trained(make, task, plan.training, seed, plan.times)
        rows[name] = {**result, "params": params(made)}
    rows["slimmed"]["latency"], rows["uniform"]["latency"] = found["share"], share
    return {
        "task": plan.task,
        "timing": clock.about(),
        "importance": slim.importance,
        "candidate": found["candidate"].to_json(),
        "actions": found["actions"],
        "predicted": found["predicted"],
        "networks_measured": found["measured"],
        "uniform_scale": scale_found,
        "networks": rows,
        "check": checked(rows, plan.target),
    }


def checked(rows: Mapping[str, Mapping[str, Any]], target: float) -> dict[str, Any]:
    """Whether the target is met closely, and by how much uniform widths are beaten."""
    latency = rows["slimmed"]["latency"]
    ahead = rows["slimmed"]["accuracy"] - rows["uniform"]["accuracy"]
    meets = bool((1 - NEAR) * target <= latency <= target)
    return {
        "target": target,
        "latency": latency,
        "latency_of_uniform": rows["uniform"]["latency"],
        "ahead": ahead,
        "meets": meets,
        "holds": bool(meets and ahead > 0),
    }


RECIPE = Recipe(
    name="efficientformer",
    title="EfficientFormer: slimming by measured latency",
    source="Li, Yuan, Wen, Hu, Evangelidis, Tulyakov, Wang & Ren, EfficientFormer: Vision Transformers "
    "at MobileNet Speed (NeurIPS 2022), https://arxiv.org/abs/2206.01191",
    parts=(
        "space: MetaPath, widths of the stages, each block a pool, nothing or, in the last stage, "
        "attention",
        "relaxation: soft Gumbel softmax over the operators of a block, cooled from 5 to 0.5",
        "rule: one level, weights and chances on the same batch",
        "cost: a table of pieces measured in ONNX Runtime on one thread, corrected by measuring "
        "networks on the way",
        "solver: greedy; drop the least important block, turn the first attention into a pool, or narrow "
        "the least important stage, whichever loses least importance for a millisecond",
        "baseline: the largest network with all widths scaled to the same measured latency",
    ),
    works_when="From one supernet on CIFAR-10 at 16x16 the slimmed network's measured latency is at "
    "most the target, 55% of the largest's, and at most 10% below it; trained alone it is more accurate "
    "than the largest network narrowed to that latency, in at least 4 of 5 seeds.",
    run=run,
    text="""
The supernet is trained once, at its largest widths. A block's importance is how much likelier its
operator is than none; a stage's is the sum over its blocks. Then no weight is touched any more: one
action after the other is taken, by a table of latencies, until the target is met. The table says where
to look; the networks around that place are built and measured, and the first that keeps the target as
measured is the answer.

Both that network and the uniformly narrowed one are trained alone from fresh weights.

Differs from the paper: what an action loses is counted in importance, also for widths, where the paper
looks at accuracy; images and networks are small; there is no distillation. At smoke scale latency is a
formula.
""",
)
