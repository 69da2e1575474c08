"""LowFormer: blocks chosen by measured latency instead of by multiply-accumulates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from espalier import tasks
from espalier.costs import OnnxRuntime
from espalier.recipes import Recipe
from espalier.recipes._parts.measured import (
    Clock,
    Counted,
    Processor,
    conv,
    macs,
    params,
    sample,
    trained,
)
from espalier.train import Recipe as Training

APART = 1.1  # a ratio of latencies that counts as a difference
FASTER = 0.85  # latency of the network chosen by latency, over that of the other one
EQUAL = 0.01  # accuracy that may be lost
HEADS = 4


@dataclass(frozen=True)
class Plan:
    """Data, training, sizes of the stages; whether latency is measured, and on which batch too."""

    task: str = "cifar10:size=16,train=3000,validation=500,test=4000"
    training: Training = field(default_factory=lambda: Training(epochs=14, lr=0.1))
    times: int = 1
    widths: tuple[int, ...] = (16, 32, 64)
    depth: int = 2
    measured: bool = True
    rounds: int = 9
    batch: int = 16  # of the throughput


PLANS = {
    "smoke": Plan(
        "digits:train=128,validation=64,test=100",
        Training(epochs=1, batch=32),
        widths=(8, 24),
        depth=1,
        measured=False,
    ),
    "cpu": Plan(),
    "gpu": Plan(
        "cifar10", Training(epochs=100, lr=0.1), 3, widths=(32, 64, 128, 256), depth=3, batch=64
    ),
}


class Residual(nn.Module):
    """A shortcut around layers that keep the shape."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.body(x)
        return out


def inverted(width: int) -> nn.Module:
    """An inverted bottleneck of expansion 4: 1x1, depthwise 3x3, 1x1 (Sandler et al., 2018)."""
    wide = 4 * width
    return Residual(
        *conv(width, wide), *conv(wide, wide, 3, groups=wide), *conv(wide, width, relu=False)
    )


def fused(width: int) -> nn.Module:
    """The depthwise convolution fused with the 1x1 before it, without expansion: 3x3, 1x1."""
    return Residual(*conv(width, width, 3), *conv(width, width, relu=False))


class Attention(nn.Module):
    """Attention over all pixels `(b, c, h, w)`, which are tokens, beside a shortcut.

    `slim`: over half as many pixels a side and half as many channels: a strided depthwise
    convolution before it, values repeated behind it.
    """

    def __init__(self, width: int, slim: bool) -> None:
        super().__init__()
        self.slim, inner = slim, width // 2 if slim else width
        self.before: nn.Module = (
            nn.Sequential(*conv(width, width, 3, 2, width, relu=False))
            if slim
            else nn.BatchNorm2d(width)
        )
        self.mixed = nn.Conv2d(width, 3 * inner, 1)
        self.out = nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        small = self.before(x)
        q, k, v = (_tokens(t) for t in self.mixed(small).chunk(3, 1))
        seen = functional.scaled_dot_product_attention(q, k, v).transpose(2, 3)
        back: Tensor = self.out(seen.reshape(-1, self.out.in_channels, *small.shape[2:]))
        if self.slim:
            back = functional.interpolate(back, scale_factor=2.0, mode="nearest")
        return x + back


def _tokens(x: Tensor) -> Tensor:
    """Pixels `(b, c, h, w)` as tokens of heads `(b, heads, h * w, c / heads)`."""
    heads = x.reshape(-1, HEADS, x.shape[1] // HEADS, x.shape[2] * x.shape[3])
    return heads.transpose(2, 3)


BLOCKS: dict[str, Callable[[int], nn.Module]] = {"inverted": inverted, "fused": fused}
# what ends a stage: whether pixels far apart are mixed there, and how
MIXERS: dict[str, Callable[[int], nn.Module]] = {
    "attention": partial(Attention, slim=False),
    "slim attention": partial(Attention, slim=True),
    "fused": fused,
}
Choice = Mapping[str, str]  # of a place: its block


def network(
    channels: int, classes: int, widths: Sequence[int], depth: int, choice: Choice
) -> nn.Sequential:
    """A stem, and stages of `depth` chosen blocks and, but for the first, a mixer.

    Between stages are strided convolutions.
    """
    layers: list[nn.Module] = conv(channels, widths[0], 3)
    for index, width in enumerate(widths):
        if index:
            layers += conv(widths[index - 1], width, 3, 2)
        layers += [BLOCKS[choice[f"stage{index + 1}"]](width) for _ in range(depth)]
        if index:
            layers.append(MIXERS[choice[f"mixer{index + 1}"]](width))
    end = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes)]
    return nn.Sequential(*layers, *end)


def profile(plan: Plan, shape: Sequence[int], clock: Clock, batched: Clock) -> list[dict[str, Any]]:
    """Every block at the width and resolution of its place: multiply-accumulates and times."""
    rows = []
    for index, width in enumerate(plan.widths):
        x = torch.zeros(1, width, shape[1] >> index, shape[2] >> index)
        options = {(f"stage{index + 1}", name): make(width) for name, make in BLOCKS.items()}
        if index:
            options |= {(f"mixer{index + 1}", name): make(width) for name, make in MIXERS.items()}
        blocks = list(options.values())
        ms, many = clock.ms(blocks, x), batched.ms(blocks, x)
        for (place, name), block, one, several in zip(options, blocks, ms, many, strict=True):
            rows.append(
                {
                    "place": place,
                    "block": name,
                    "macs": macs(block, x),
                    "ms": one,
                    "ms_in_batch": several / (plan.batch if plan.measured else 1),
                }
            )
    return rows


def disagreements(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Pairs of blocks of which the one with fewer multiply-accumulates is the slower one."""
    found = []
    for a, b in combinations(rows, 2):
        less, more = (a, b) if a["macs"] < b["macs"] else (b, a)
        if less["macs"] < more["macs"] and less["ms"] > APART * more["ms"]:
            names = {k: f"{r['place']} {r['block']}" for k, r in (("fewer", less), ("more", more))}
            found.append({**names, "slower": less["ms"] / more["ms"]})
    return found


def chosen(rows: Sequence[Mapping[str, Any]], by: str) -> dict[str, str]:
    """The block of each place that is least in one column.

    Times that are nearly the least count as equal; then multiply-accumulates decide.
    """
    near = APART if by == "ms" else 1.0
    found = {}
    for place in dict.fromkeys(r["place"] for r in rows):
        here = [r for r in rows if r["place"] == place]
        least = min(float(r[by]) for r in here)
        equal = [r for r in here if float(r[by]) <= near * least]
        found[place] = str(min(equal, key=lambda r: float(r["macs"]))["block"])
    return found


def run(scale: str, seed: int, out: Path | None) -> dict[str, Any]:
    """Profiles the blocks, chooses by either column, trains both networks."""
    plan = PLANS[scale]
    task = tasks.make(plan.task, seed)
    x = sample(task)
    clock: Clock = Counted()
    batched: Clock = Counted(launch=0.0)
    if plan.measured:
        clock = Processor(rounds=plan.rounds, seed=seed)
        batched = Processor(OnnxRuntime(batch=plan.batch, seconds=0.1), plan.rounds, seed)
    rows = profile(plan, task.shape, clock, batched)
    choices = {by: chosen(rows, by) for by in ("macs", "ms")}

    makes = {
        by: partial(network, task.shape[0], task.classes, plan.widths, plan.depth, choice)
        for by, choice in choices.items()
    }
    one, other = (make() for make in makes.values())
    ratio, in_batch = clock.ratio(other, one, x), batched.ratio(other, one, x)
    networks = {}
    for by, make in makes.items():
        net, found = trained(make, task, plan.training, seed, plan.times)
        about = {"choice": choices[by], "macs": macs(net, x), "params": params(net)}
        networks[by] = {**found, **about}
    pairs = disagreements(rows)
    return {
        "task": plan.task,
        "timing": clock.about(),
        "profile": rows,
        "disagreements": pairs,
        "networks": networks,
        "check": checked(networks, ratio, in_batch, len(pairs)),
    }


def checked(
    networks: Mapping[str, Mapping[str, Any]], ratio: float, in_batch: float, pairs: int
) -> dict[str, Any]:
    """Whether orders disagree, and what following the measured one gives."""
    gained = networks["ms"]["accuracy"] - networks["macs"]["accuracy"]
    return {
        "pairs": pairs,
        "latency_of_macs": ratio,
        "time_in_batch_of_macs": in_batch,
        "gained": gained,
        "holds": bool(pairs >= 1 and ratio <= FASTER and gained >= -EQUAL),
    }


RECIPE = Recipe(
    name="lowformer",
    title="LowFormer: macro design by measured latency",
    source="Nottebaum, Dunnhofer & Micheloni, LowFormer: Hardware Efficient Design for Convolutional "
    "Transformer Backbones (WACV 2025), https://arxiv.org/abs/2409.03460",
    parts=(
        "space: in each stage an inverted bottleneck or its fused form; behind it, but for the first "
        "stage, attention over all pixels or over a quarter of them, or one more fused block",
        "profile: every block at the width and resolution of its place, alone, in ONNX Runtime on one "
        "thread, one input and a batch",
        "rule: in each place the block that takes least time; of those within 10% the one with fewest "
        "multiply-accumulates",
        "baseline: in each place the block with the fewest multiply-accumulates",
        "training: both networks alone from fresh weights, the same recipe",
    ),
    works_when="There is at least one pair of blocks of which the one with fewer multiply-accumulates "
    "is slower as measured, by 10% or more; and the network of CIFAR-10 at 16x16 that follows the "
    "measured order takes at least 15% less time than the one that follows multiply-accumulates, at "
    "most one point less accurate, in at least 4 of 5 seeds.",
    run=run,
    text="""
Multiply-accumulates say little of time: depthwise convolutions have few and are slow, a large image
with few channels is slower than a small one with many. So blocks are timed where they stand. The fused
block has no expansion, so that its work is about that of the inverted bottleneck in its place.

At the end of a stage stands attention over all pixels; attention over a quarter of them, behind a
strided depthwise convolution and with half of the channels, which has the fewest multiply-accumulates;
or one more fused block, which has the most.

Differs from the paper: attention competes with convolutions in every stage but the first; convolutions that come back to the full resolution behind the slim attention are
left out, its values are repeated; and the networks are small. At smoke scale latency is a formula.

Five seeds at the scale cpu: the check holds in four. The network chosen by time takes 0.68 to 0.70 of the latency of the one chosen by
multiply-accumulates, its accuracy lies between 1.0 points below and 0.5 above; one seed loses 1.03 points, where 1 is allowed. In a batch
the one chosen by multiply-accumulates is as fast or up to 5% faster: what was measured at batch 1 holds at batch 1.
""",
)
