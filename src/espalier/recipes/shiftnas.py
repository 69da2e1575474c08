"""ShiftNAS: supernet training that draws subnets by complexity, with a generator that writes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from espalier.recipes import Recipe
from espalier.recipes._parts.hierarchical import LARGE, TINY, Nets, Sizes, device_for

if TYPE_CHECKING:
    from espalier.nets import Supernet
    from espalier.space import Candidate
    from espalier.train import Paths
    from espalier.train.generator import Price
    from espalier.train.shift import Shift

_HIT = 0.05
_WORSE = 0.003
_DECILES = 10
_SHARP = 3.0


@dataclass(frozen=True)
class Plan:
    """Data, elastic sizes, the length of training and what is judged.

    `each`: subnets in each tenth of the range of multiply-accumulates. `targets`: of these the
    generator is asked for networks. `tries`: how many it writes for one, of which the nearest is
    taken.
    """

    task: str
    sizes: Sizes
    epochs: int = 12
    batch: int = 64
    bins: int = 8
    every: int = 2
    warmup: int = 300
    each: int = 6
    targets: int = 20
    tries: int = 32


PLANS = {
    "smoke": Plan(
        "digits:train=192,validation=150,test=150",
        TINY,
        epochs=3,
        bins=4,
        every=1,
        warmup=40,
        each=1,
        targets=4,
    ),
    "cpu": Plan("digits", Sizes()),
    "gpu": Plan("cifar10", LARGE, epochs=200, batch=256, bins=10, every=10, warmup=1000, each=20),
}


def macs_of(net: Supernet) -> Price:
    """Multiply-accumulates of weights `{decision: (n, options)}`, exact and differentiable."""
    from torch import Tensor

    from espalier.solvers.relax.expected import counted, expected_cost

    expected = expected_cost(net, counted("macs"), net.space.names)
    tables = [(names, table.float()) for names, table in expected.tables.items()]

    def price(weights: Mapping[str, Tensor]) -> Tensor:
        first = next(iter(weights.values()))
        total = first.new_full((len(first),), expected.constant)
        for names, table in tables:
            mean = table.reshape(*table.shape, 1).to(first)  # a row of weights in the last place
            for name in reversed(names):
                mean = (mean * weights[name].T).sum(-2)
            total = total + mean
        return total

    return price


def spread(net: Supernet, price: Price, each: int, seed: int) -> tuple[list[Candidate], Any]:
    """Random subnets, as many in each tenth of the range of MACs, and their tenth `(n,)`.

    Options are drawn about a place in their order that is drawn for each subnet, so that the ends
    of the range, where uniform options hardly ever are, are met.
    """
    import torch

    from espalier.train.onehot import one_hot

    space, rng = net.space, np.random.default_rng([seed, 7])
    counts = np.array([d.count for d in space.decisions])
    with torch.no_grad():
        ends = [space.decode(space.corner(last))[0] for last in (False, True)]
        low, high = price(one_hot(space, ends)).tolist()
        kept: list[Any] = []
        found: list[int] = []
        for _ in range(200):
            place = rng.random((256, 1))
            codes = space.canonical(rng.binomial(counts - 1, place).astype(space.dtype))
            macs = price(one_hot(space, space.decode(codes))).numpy()
            tenth = np.minimum((macs - low) / (high - low) * _DECILES, _DECILES - 1).astype(int)
            for row, t in zip(codes, tenth.tolist(), strict=True):
                if found.count(t) < each:
                    kept.append(row)
                    found.append(t)
            if len(found) == each * _DECILES:
                break
    return space.decode(np.stack(kept)), np.array(found)


class Bench(Nets):
    """Supernets of one plan, trained in several ways with equally many steps, and judged."""

    def __init__(self, plan: Plan, seed: int, device: str) -> None:
        super().__init__(plan.task, plan.sizes, seed, device, plan.batch)
        self.plan = plan
        net = self.fresh()
        self.price, self.space = macs_of(net), net.space
        self.judged, self.tenths = spread(net, self.price, plan.each, seed)

    def shift(self, sharpness: float) -> Shift:
        """The settings of a run."""
        from espalier.train.shift import Shift

        return Shift(
            bins=self.plan.bins,
            every=self.plan.every,
            warmup=self.plan.warmup,
            sharpness=sharpness,
        )

    def row(self, paths: Paths) -> dict[str, Any]:
        """Mean accuracy in each tenth after a training."""
        net, seconds = self.trained(paths, self.plan.epochs)
        found = np.array(self.accuracies(net, self.judged, "test"))
        by = [float(found[self.tenths == t].mean()) for t in sorted(set(self.tenths.tolist()))]
        middle = (self.tenths > 0) & (self.tenths < _DECILES - 1)
        out = {
            "tenths": by,
            "ends": (by[0] + by[-1]) / 2,
            "middle": float(found[middle].mean()),
            "seconds": seconds,
        }
        return out | self._asked(net, paths)

    def _asked(self, net: Supernet, paths: Paths) -> dict[str, Any]:
        """How far off its targets the generator of a run is, and how good what it writes."""
        import torch

        from espalier.train.onehot import one_hot
        from espalier.train.shift import Shifting

        if not isinstance(paths, Shifting):
            return {}
        scale = paths.scale
        places = (np.arange(self.plan.targets) + 0.5) / self.plan.targets
        targets = scale.low + places * (scale.high - scale.low)
        out: dict[str, Any] = {"probabilities": paths.history[-1]["probabilities"]}
        for name, tries in (("first", 1), ("nearest", self.plan.tries)):
            written = [paths.candidate(float(t), tries, self.seed) for t in targets]
            with torch.no_grad():
                macs = self.price(one_hot(self.space, written)).numpy()
            off = np.abs(macs - targets) / targets
            out[f"{name}_off"] = {"mean": float(off.mean()), "most": float(off.max())}
        out["written"] = float(np.mean(self.accuracies(net, written, "test")))
        return out


def run(scale: str, seed: int, out: Path | None) -> dict[str, Any]:
    """Trains uniformly, by equally likely bins and by shifting ones, in equally many steps."""
    from espalier.train import Uniform
    from espalier.train.shift import Shifting

    plan = PLANS[scale]
    bench = Bench(plan, seed, device_for(scale))
    rows = {
        "uniform": bench.row(Uniform(1)),
        "even_bins": bench.row(Shifting(bench.space, bench.price, bench.shift(0.0), seed)),
        "shifting": bench.row(Shifting(bench.space, bench.price, bench.shift(_SHARP), seed)),
    }
    ours, theirs = rows["shifting"], rows["uniform"]
    gain = {name: ours[name] - theirs[name] for name in ("ends", "middle")}
    hits = ours["nearest_off"]["mean"] <= _HIT
    return {
        "task": plan.task,
        "subnets": len(bench.judged),
        "rows": rows,
        "check": {
            "gain": gain,
            "off": {name: ours[f"{name}_off"] for name in ("first", "nearest")},
            "hits": hits,
            "holds": gain["ends"] > 0 and gain["middle"] >= -_WORSE and hits,
        },
    }


RECIPE = Recipe(
    name="shiftnas",
    title="ShiftNAS: sampling that shifts to where subnets still get better",
    source="Zhang et al., ShiftNAS: Improving One-shot NAS via Probability Shift (2023), "
    "https://arxiv.org/abs/2307.08300",
    parts=(
        "space: HierarchicalViT, width and depth of each stage, heads and ratio of each block",
        "training: Shifting, a bin of MACs drawn, an LSTM writes the subnet, one a step",
        "cost: expected multiply-accumulates, exact and differentiable, from a table of units",
        "query: the generator gives a network for any MACs; of several that it writes, the nearest",
        "baselines: uniform options; the same generator with equally likely bins",
    ),
    works_when="In equally many steps, the mean accuracy of subnets in the first and the last tenth "
    "of the range of MACs is higher than with uniform options, that of the others at most 0.3 points "
    "lower, and what the generator writes is within 5% of the requested MACs on average, in at "
    "least 4 of 5 seeds.",
    run=run,
    text="""
Tenths are of the range of multiply-accumulates from the smallest to the largest network, with
equally many random subnets in each; none of them comes from the generator. Bins are equal ratios
of it: with equally wide ones the smallest subnets, which differ most, were drawn too rarely. A bin's
probability is the softmax of 3 times how much its mean training loss fell since the last
comparison, in nats.

Differs from the paper: the generator first learns to meet targets alone, without a network, and in
each step of further targets (the tables of costs make that cheap); its gradient from the network is
that of the options that ran, since sizes are slices and what is not chosen is not computed; losses
are those seen in training, so a comparison costs nothing; and the entropy of the choices is
rewarded, without which the generator writes nearly the same subnets over and over.
""",
)
