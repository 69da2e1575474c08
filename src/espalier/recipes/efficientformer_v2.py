"""EfficientFormerV2: greedy slimming of a hybrid supernet, by latency and parameters at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from espalier.recipes import Recipe

if TYPE_CHECKING:
    from espalier.space import Candidate, Space

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Plan:
    """Data, the training of the supernet, images that score an action, and where slimming ends.

    `pieces` of the latency table are measured; none: multiply-accumulates stand for latency.
    `goal`: how much better than the largest network the joint efficiency is to become, as
    (latency ratio * parameters ratio) ** -0.5.
    """

    task: str
    epochs: int
    scored: int
    goal: float = 3.0
    pieces: int = 0
    widths: tuple[tuple[int, ...], ...] | None = None
    depth: tuple[int, ...] = (1, 2, 3)
    expansion: tuple[float, ...] = (1, 2, 3)
    calibration: int = 256


PLANS = {
    "smoke": Plan(
        "digits:train=128,validation=100,test=100",
        2,
        60,
        1.6,
        depth=(1, 2),
        expansion=(1, 2),
        widths=((8,), (8, 16), (16, 32)),
        calibration=32,
    ),
    "cpu": Plan(
        "cifar10:size=16,train=2000,validation=600,test=2000",
        12,
        500,
        pieces=40,
        widths=((8, 12, 16), (16, 20, 24, 32), (32, 40, 48, 64)),
        depth=(1, 2),
    ),
    "gpu": Plan("cifar10", 300, 5000, pieces=250),
}
# Exponents of (latency, parameters) in the efficiency by which each search picks its actions.
SEARCHES = {"joint": (0.5, 0.5), "latency_only": (1.0, 0.0), "size_only": (0.0, 1.0)}


class Prices:
    """Latency and parameters of candidates, as ratios to those of the largest."""

    def __init__(self, net: Any, pieces: int, seed: int) -> None:
        from espalier.costs import Counts, OnnxRuntime, PredictedLatency

        self.space: Space = net.space
        self._counts, self.measured = Counts(net), None
        if pieces:
            self.measured = PredictedLatency(net, OnnxRuntime(threads=1))
            self.measured.calibrate(seed, limit=pieces)
        self.largest = self._raw(self.space.corner(True))[0]

    def _raw(self, codes: Any) -> Array:
        counted = self._counts.estimate_codes(codes)
        if self.measured is None:
            latency = counted["macs"]
        else:
            latency = self.measured.estimate_codes(codes)["latency_ms"]
        return np.stack([latency, counted["params"]], axis=1).astype(float)

    def __call__(self, codes: Any) -> Array:
        """Rows of (latency, parameters) `(n, 2)`."""
        found: Array = self._raw(codes) / self.largest
        return found


class Slimming:
    """Goes from the largest network down, each time by the action that harms least for its gain.

    An action takes one option of one decision down by one step. Its harm is the accuracy lost with
    the shared weights, its gain how much the efficiency grows: the product of each ratio to the
    largest network, to the power of minus its exponent.
    """

    def __init__(self, net: Any, score: Any, prices: Prices, goal: float) -> None:
        self.space: Space = net.space
        self.score, self.prices, self.goal = score, prices, goal
        self.known: dict[Candidate, float] = {}

    def accuracy(self, codes: Any) -> Array:
        """Accuracies of rows, each scored once for all searches."""
        found = self.space.decode(codes)
        new = [c for c in dict.fromkeys(found) if c not in self.known]
        if new:
            self.known.update(zip(new, self.score(new), strict=True))
        return np.array([self.known[c] for c in found])

    def run(self, exponents: tuple[float, float]) -> list[dict[str, Any]]:
        """Every network gone through, the last of which reaches the goal in joint efficiency."""
        row = self.space.corner(True)
        path = [self._point(row)]
        while _efficiency(self.prices(row), SEARCHES["joint"])[0] < self.goal:
            rows = self._actions(row)
            gain = _efficiency(self.prices(rows), exponents)
            gain = gain - _efficiency(self.prices(row), exponents)
            rows, gain = rows[gain > 1e-9], gain[gain > 1e-9]
            if not len(rows):
                break  # what this search looks at can't get better
            harm = self.accuracy(row)[0] - self.accuracy(rows)
            # what harms nothing, by its gain; else the least harm for the gain
            value = np.where(harm <= 0, -gain, harm / gain)
            row = rows[np.argmin(value)][None]
            path.append(self._point(row))
        return path

    def _actions(self, row: Any) -> Any:
        active = self.space.active(row)[0]
        found = []
        for column in np.flatnonzero(active & (row[0] > 0)):
            other = row.copy()
            other[0, column] -= 1
            found.append(other)
        return self.space.canonical(np.concatenate(found)) if found else row[:0]

    def _point(self, row: Any) -> dict[str, Any]:
        latency, params = self.prices(row)[0]
        return {
            "latency": float(latency),
            "params": float(params),
            "accuracy": float(self.accuracy(row)[0]),
            "candidate": self.space.decode(row)[0].to_json(),
        }


def _efficiency(prices: Array, exponents: tuple[float, float]) -> Array:
    """How many times as efficient as the largest network each is."""
    out: Array = np.prod(prices ** -np.array(exponents), axis=1)
    return out


def dominates(a: Mapping[str, float], b: Mapping[str, float]) -> bool:
    """Whether `a` is nowhere worse than `b`, and somewhere better."""
    mine = np.array([a["latency"], a["params"], -a["accuracy"]])
    other = np.array([b["latency"], b["params"], -b["accuracy"]])
    return bool((mine <= other).all() and (mine < other).any())


def _judged(found: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The ends of the searches against each other, and the joint one against all on the others' way."""
    ends = {name: path[-1] for name, path in found.items()}
    joint, others = ends["joint"], [name for name in ends if name != "joint"]
    met = [point for name in others for point in found[name]]
    all_met = [point for path in found.values() for point in path]
    return {
        "ends": ends,
        "dominates": {name: dominates(joint, ends[name]) for name in others},
        "dominated_by_ends": [name for name in others if dominates(ends[name], joint)],
        "dominated_on_the_way": sum(dominates(point, joint) for point in met),
        "on_front": {n: not any(dominates(p, e) for p in all_met) for n, e in ends.items()},
        "more_accurate": {n: joint["accuracy"] - ends[n]["accuracy"] for n in others},
        "holds": all(dominates(joint, ends[n]) for n in others)
        or not any(dominates(point, joint) for point in met),
    }


def run(scale: str, seed: int, out: Path | None) -> dict[str, Any]:
    """Trains the supernet by the sandwich rule, slims it three ways, compares the ends on test."""
    import torch

    from espalier import tasks
    from espalier.estimators import OneShot
    from espalier.nets.hybrid import Hybrid
    from espalier.train import Recipe as Training
    from espalier.train import train_supernet

    plan = PLANS[scale]
    task = tasks.make(plan.task, seed)
    device = "cuda" if scale == "gpu" and torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    net = Hybrid(
        task.shape, task.classes, widths=plan.widths, depth=plan.depth, expansion=plan.expansion
    ).to(device)
    history = train_supernet(net, task, Training(epochs=plan.epochs, lr=0.1), seed)
    judge = OneShot(net, task, seed, images=plan.scored, calibration_images=plan.calibration)
    prices = Prices(net, plan.pieces, seed)
    slim = Slimming(net, lambda c: judge.estimate(c)[judge.metrics[0].name], prices, plan.goal)
    found = {name: slim.run(exponents) for name, exponents in SEARCHES.items()}
    last = OneShot(net, task, seed, "test", task.size("test"), plan.calibration)
    for path in found.values():
        for point in path:
            scored = last.estimate([net.space.candidate(point["candidate"])])
            point["validation"] = point["accuracy"]
            point["accuracy"] = float(scored[last.metrics[0].name][0])
    return {
        "task": plan.task,
        "loss": history[-1]["loss"],
        "latency": "macs" if prices.measured is None else prices.measured.error,
        "largest": dict(zip(("latency", "params"), prices.largest.tolist(), strict=True)),
        "evaluations": len(slim.known),
        "steps": {name: len(path) - 1 for name, path in found.items()},
        "check": _judged(found),
    }


RECIPE = Recipe(
    name="efficientformer-v2",
    title="EfficientFormerV2: fine-grained joint search for latency and size",
    source="Li et al., Rethinking Vision Transformers for MobileNet Size and Speed (2023), "
    "https://arxiv.org/abs/2212.08059",
    parts=(
        "space: Hybrid, convolutional stages with attention in the last; width and depth of each "
        "stage, expansion of each block",
        "estimator: a supernet trained by the sandwich rule; batch-norm statistics set for each",
        "costs: latency predicted from measured pieces, parameters counted",
        "search: greedy slimming by accuracy lost for efficiency gained, both costs at once",
        "baselines: the same by latency alone and by parameters alone, to the same joint efficiency",
    ),
    works_when="From one supernet on CIFAR-10 at 16x16, the network that joint slimming ends with "
    "dominates those of latency-only and size-only slimming in (latency, parameters, accuracy), or "
    "no network that they went through dominates it, in at least 4 of 5 seeds.",
    run=run,
    text="""
All three searches start from the largest network and take one option down by one step at a time,
until latency and parameters together (the root of the product of their ratios to the largest
network) are three times better. They differ only in what an action's gain is: the joint one counts
both, the others latency or parameters alone. Accuracy is scored on validation with the shared
weights while slimming, and reported on test. On a machine without a calibrated table (and at smoke
scale) multiply-accumulates stand for latency.

Differs from the paper: the score is accuracy lost for efficiency gained, an action that loses
nothing is taken by its gain; attention is plain and in the last stage only; the networks are small,
and the one that is found is not trained anew.

Five seeds at the scale cpu: the check holds in all. The joint search ends on the front of latency, parameters and
accuracy in all five, and nothing that the others pass on their way dominates it; so do the searches by
size alone (five) and by latency alone (four). It dominates neither of them but once: which sizes are looked at matters
less than that all start from one supernet.
""",
)
