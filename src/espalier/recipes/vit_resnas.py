"""ViT-ResNAS: several subnets of a multi-stage transformer learn in one pass; then evolution."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from espalier.recipes import Recipe
from espalier.recipes._parts.hierarchical import LARGE, TINY, Nets, Sizes, device_for

if TYPE_CHECKING:
    from espalier.nets.hierarchical import HierarchicalViT
    from espalier.space import Candidate
    from espalier.train import Paths

SUBNETS = 4
_COST = 1.15
_STALLED = 0.05


@dataclass(frozen=True)
class Plan:
    """Data, elastic sizes, the length of training, and what is measured.

    `timed`: steps that costs are measured on. `judged`: subnets whose accuracy is averaged.
    `asked`: candidates of the evolution. `deep`: blocks a stage of the plain networks that tell
    reductions apart, of which there are `stages`, trained for `deep_epochs` on digits.
    """

    task: str
    sizes: Sizes
    epochs: int = 10
    batch: int = 64
    timed: int = 15
    judged: int = 12
    asked: int = 64
    stages: int = 5
    deep: tuple[int, ...] = (1, 6)
    deep_epochs: int = 6
    deep_images: str = "digits"


PLANS = {
    "smoke": Plan(
        "digits:train=256,validation=150,test=150",
        TINY,
        epochs=2,
        timed=1,
        judged=2,
        asked=8,
        stages=3,
        deep=(1, 2),
        deep_epochs=1,
        deep_images="digits:train=256",
    ),
    "cpu": Plan("digits", Sizes(((48, 64, 96), (96, 128, 192)), ((2, 4), (4, 6, 8))), batch=128),
    "gpu": Plan("cifar10", LARGE, epochs=200, batch=256, asked=1000, deep=(1, 12), deep_epochs=40),
}


class Bench(Nets):
    """Supernets of one plan, trained and measured."""

    def __init__(self, plan: Plan, seed: int, device: str) -> None:
        super().__init__(plan.task, plan.sizes, seed, device, plan.batch)
        self.plan = plan

    def costs(self) -> dict[str, float]:
        """Seconds of a step, forward and backward, of one batch: medians, taken in turns.

        "largest" and "sampled": one subnet, of which only what it uses is computed; "masked": one
        random subnet by masks; "together": four by masks.
        """
        import torch

        from espalier.train.together import Together

        net, rng = self.fresh().train(), np.random.default_rng(self.seed)
        x, y = next(iter(self.task.batches("train", self.plan.batch)))
        x, y = x.to(self.device), y.to(self.device)
        one, four = Together(1), Together(SUBNETS)
        for paths in (one, four):
            paths.begin(net.space, 0, 1, self.plan.timed + 2, self.seed)
        largest = net.uniform(1.0)
        set_: dict[str, Callable[[int], object]] = {
            "largest": lambda step: net.activate(largest),
            "sampled": lambda step: net.activate(net.space.decode(net.space.sample(1, rng))[0]),
            "masked": lambda step: one(step)[0].apply(net, len(x)),
            "together": lambda step: four(step)[0].apply(net, len(x)),
        }
        taken: dict[str, list[float]] = {name: [] for name in set_}
        for step in range(self.plan.timed + 2):
            for name, put in set_.items():
                start = self.clock()
                put(step)
                torch.nn.functional.cross_entropy(net(x), y).backward()  # type: ignore[no-untyped-call]
                taken[name].append(self.clock() - start)
                net.zero_grad(set_to_none=True)
        return {name: statistics.median(times[2:]) for name, times in taken.items()}

    def learning(self, costs: Mapping[str, float]) -> tuple[dict[str, Any], HierarchicalViT]:
        """One subnet a step against four, in equal time and in equal steps; mean test accuracies."""
        from espalier.train import Uniform
        from espalier.train.together import Together

        plan = self.plan
        longer = round(plan.epochs * costs["together"] / costs["sampled"])
        arms: dict[str, tuple[Paths, int]] = {
            "together": (Together(SUBNETS), plan.epochs),
            "one_equal_time": (Uniform(1), longer),
            "one_equal_steps": (Uniform(1), plan.epochs),
        }
        space = self.fresh().space
        codes = space.sample(plan.judged, np.random.default_rng([self.seed, 1]))
        chosen = space.decode(codes)
        out: dict[str, Any] = {}
        nets = {}
        for name, (paths, epochs) in arms.items():
            nets[name], seconds = self.trained(paths, epochs)
            accuracies = self.accuracies(nets[name], chosen, "test")
            out[name] = {
                "epochs": epochs,
                "seconds": seconds,
                "accuracy": float(np.mean(accuracies)),
                "least": min(accuracies),
            }
        return out, nets["together"]

    def evolved(self, net: HierarchicalViT) -> dict[str, Any]:
        """Evolution under a cap on MACs, the median of the space, against as many random draws."""
        from espalier.costs import Counts
        from espalier.solvers.strategies import make

        counts, space = Counts(net), net.space
        rng = np.random.default_rng([self.seed, 2])

        def macs(codes: Any) -> Any:
            return np.asarray(counts.estimate_codes(codes)["macs"])

        cap = float(np.median(macs(space.sample(200, rng))))
        out: dict[str, Any] = {"cap": cap}
        for strategy in ("evolution", "random"):
            search = make(strategy, space, self.seed)
            seen: list[tuple[float, Candidate]] = []
            while len(seen) < self.plan.asked:
                codes = search.ask(min(8, self.plan.asked - len(seen)))
                chosen = space.decode(codes)
                right = self.accuracies(net, chosen, "validation")
                beyond = np.maximum(macs(codes) / cap - 1.0, 0.0)
                search.tell(codes, 1.0 - np.array(right)[:, None], beyond)
                scores = np.where(beyond > 0, -1.0, right)
                seen += zip(scores.tolist(), chosen, strict=True)
            score, best = max(seen, key=lambda found: found[0])
            out[strategy] = {
                "validation": score,
                "test": self.accuracies(net, [best], "test")[0],
                "candidate": best.to_json(),
            }
        return out


def reductions(plan: Plan, seed: int, device: str) -> dict[str, Any]:
    """Networks of fixed sizes, shallow and deep, with residual and with plain reduction."""
    import torch

    from espalier import tasks
    from espalier.nets.hierarchical import HierarchicalViT, Reduction
    from espalier.train import Recipe as Training
    from espalier.train import evaluate, fit

    task = tasks.make(plan.deep_images, seed)
    recipe = Training(
        epochs=plan.deep_epochs, lr=0.2, weight_decay=1e-4, clip=1.0, precision="fp32"
    )
    widths = (16, 32, 48, 48, 48)[: plan.stages]
    out: dict[str, Any] = {}
    kinds: tuple[Reduction, ...] = ("residual", "plain")
    for depth in plan.deep:
        for kind in kinds:
            torch.manual_seed(seed)
            family = HierarchicalViT(
                task.shape,
                task.classes,
                widths=widths,
                heads=[2] * plan.stages,
                depth=depth,
                ratio=2,
                patch=2,
                reduction=kind,
            )
            network = family.build({}).to(device)
            history = fit(network, task, recipe, seed)
            out[f"{kind}_{depth}"] = {
                "loss": history[-1]["loss"],
                "accuracy": evaluate(network, task, "test")["accuracy"],
            }
    most = max(plan.deep)
    out["gap"] = out[f"residual_{most}"]["accuracy"] - out[f"plain_{most}"]["accuracy"]
    return out


def run(scale: str, seed: int, out: Path | None) -> dict[str, Any]:
    """Measures costs, trains with one and with four subnets a step, searches; tells reductions apart."""
    plan = PLANS[scale]
    device = device_for(scale)
    bench = Bench(plan, seed, device)
    costs = bench.costs()
    learned, net = bench.learning(costs)
    searched = bench.evolved(net)
    deep = reductions(plan, seed, device)
    ratios = {n: costs["together"] / costs[n] for n in ("largest", "sampled", "masked")}
    together = learned["together"]["accuracy"]
    gains = {n: together - learned[f"one_{n}"]["accuracy"] for n in ("equal_time", "equal_steps")}
    return {
        "task": plan.task,
        "device": device,
        "seconds_a_step": costs,
        "learning": learned,
        "search": searched,
        "reductions": deep,
        "check": {
            "cost_ratios": ratios,
            "cheap": ratios["largest"] <= _COST,
            "gain": gains,
            "better_in_equal_time": gains["equal_time"] > 0,
            "reduction_gap": deep["gap"],
            "plain_stalls": deep["gap"] >= _STALLED,
            "holds": ratios["largest"] <= _COST
            and gains["equal_time"] > 0
            and deep["gap"] >= _STALLED,
        },
    }


RECIPE = Recipe(
    name="vit-resnas",
    title="ViT-ResNAS: several subnets of a multi-stage transformer in one pass",
    source="Liao, Karaman & Sze, Searching for Efficient Multi-Stage Vision Transformers (2021), "
    "https://arxiv.org/abs/2109.00642",
    parts=(
        "space: HierarchicalViT, width and depth of each stage, heads and ratio of each block",
        "training: Together, a batch in four parts, each masked to a subnet of its own",
        "strategy: evolution under a cap on multiply-accumulates",
        "estimator: the shared weights",
        "baselines: one subnet a step, in equal time and in equal steps; plain reduction",
    ),
    works_when="A step of 4 subnets takes at most 1.15 times that of the largest subnet alone; the "
    "mean accuracy of random subnets is higher than with one subnet a step in equal time; and a deep "
    "network with residual reduction is at least 5 points more accurate than with plain reduction, "
    "in at least 4 of 5 seeds.",
    run=run,
    text="""
A step's cost is compared with three others: of the largest subnet alone, of a random one of which
only what it uses is computed (as `activate` does), and of a random one by masks. Equal time means
equal processor time with the second, the cheapest way here: sizes are slices, and a smaller
subnet takes less time. The paper masks in either case, so that a step costs the same with one
subnet and with several; that comparison is "equal steps".

Reductions are told apart by networks of fixed sizes in five stages (8x8 images, two pixels a token,
down to one token), with one and with six blocks a stage, trained alike from the same seed.

Differs from the paper: sizes are made for small images; SGD; sampling is not restricted to subnets
near the budget (`Together(wanted=...)` can be), and the network found is not trained anew.
""",
)
