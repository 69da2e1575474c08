"""EfficientFormer: a supernet slimmed step by step until it meets a measured latency."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from espalier import tasks
from espalier.costs import Counts, PredictedLatency
from espalier.nets.metapath import MetaPath
from espalier.recipes import Recipe
from espalier.recipes._parts.measured import (
    Clock,
    Counted,
    Processor,
    even,
    params,
    sample,
    trained,
    widest,
)
from espalier.recipes._parts.slimming import Milliseconds, Slimming, met
from espalier.solvers.relax import Gumbel, Settings, SingleLevel, relax
from espalier.train import Recipe as Training
from espalier.train.schedules import exponential
from espalier.train.seeds import global_seed

NEAR = 0.1  # how far below the target a measured latency counts as met


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
measured is the answer, options of it a step larger as long as that still fits.

Both that network and the uniformly narrowed one are trained alone from fresh weights.

Differs from the paper: what an action loses is counted in importance, also for widths, where the paper
looks at accuracy; images and networks are small; there is no distillation. At smoke scale latency is a
formula.

Five seeds at the scale cpu: the check holds in all. The network takes 0.50 to 0.55 of the largest's latency, where 0.55 is the target, and is 1.1 to 3.5
points more accurate than uniform widths at or below that latency (0.45, 0.49, 0.49, 0.38 and 0.55: the fourth has a quarter less
than its rival, since the next scale was over it). In a first run on the same seeds only one option was given back, and four networks
ended 12% and more below the target; that was mended.
""",
)
