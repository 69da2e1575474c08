"""The search phase by gradients: weights and architecture learn together, then it is drawn from.

`solver="relax"` of a search: Gumbel-softmax mixtures (Jang et al., 2017) that cool down, so that the
weights get used to one option at a time, and a term for each limit that the pieces can price
(FBNet, Wu et al., 2019).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from espalier.errors import EspalierError
from espalier.flows import expected
from espalier.flows.weights import derive
from espalier.nets import Family, Supernet
from espalier.problem import Limit
from espalier.solvers.relax import ExpectedCost, Gumbel, Relaxed, Settings, relax
from espalier.solvers.strategies.random import Random
from espalier.solvers.strategies.strategy import Codes
from espalier.space import Candidate, Space
from espalier.train.schedules import exponential

if TYPE_CHECKING:
    from espalier.flows.job import Job

_HOT, _COLD = 5.0, 0.3  # temperatures of the first and the last epoch
_TRAVEL = 10.0  # how far a logit can go in a whole search; Adam moves it by its rate in a step
_RATES = (3e-4, 0.1)
_PRESSURE = 2.0  # what a cost of twice its limit adds to the loss
_FLATTER = (1.0, 1.0, 1.5, 2.0, 3.0)  # temperatures of draws, when colder ones give nothing new


def check(family: Family, strategy: object, estimator: object) -> None:
    """Refuses what relaxation can't search. Errors: `EspalierError`."""
    if not isinstance(family, Supernet) or not family.mixable:
        raise EspalierError(
            f"solver 'relax' needs a family whose options can be mixed, {family.name} has none: "
            "leave solver out"
        )
    if estimator is not None:
        raise EspalierError(
            "solver 'relax' scores with the weights that it trains: leave estimator out"
        )
    if strategy != "nsga2":
        raise EspalierError(
            f"solver 'relax' draws from what it learned, strategy {strategy!r} is for solver "
            "'search': give one of them"
        )


def relax_shared(job: Job) -> Relaxed:
    """Trains the family's weights and its architecture; a checkpoint every epoch."""
    family = job.family
    assert isinstance(family, Supernet)
    family.activate(_largest(family.space))
    settings = settings_of(job)
    cooling = (_COLD / _HOT) ** (1 / settings.epochs)
    return relax(
        family,
        job.task,
        relaxation=Gumbel(exponential(_HOT, cooling, settings.epochs)),
        terms=terms_of(job, family),
        settings=settings,
        seed=derive(job.seed, "supernet"),
        checkpoint=job.study.folder / "relaxed.safetensors",
        progress=job.show.step,
    )


def settings_of(job: Job) -> Settings:
    """The recipe's way to learn, and a rate of the architecture that gets it somewhere in time."""
    epochs, recipe, share = job.plan.supernet_epochs, job.recipe, 0.3
    steps = epochs * max(1, round((1 - share) * job.task.size("train") / recipe.batch))
    return Settings(
        epochs=epochs,
        batch=recipe.batch,
        lr=recipe.lr / 2,  # there is no warm-up
        lr_min=recipe.lr / 200,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        clip=recipe.clip,
        precision=recipe.precision,
        augment=recipe.augment,
        arch_lr=float(np.clip(_TRAVEL / steps, *_RATES)),
        arch_decay=0.0,
        arch_share=share,
        warmup_epochs=epochs // 6,
    )


def terms_of(job: Job, family: Supernet) -> list[ExpectedCost]:
    """A term for each upper limit on a cost that adds up over pieces; notes on the others."""
    base = _largest(family.space)
    found = []
    for limit in job.limits:
        value = _value(job, limit)
        constant = 0.0
        if limit.metric == "latency_ms":
            constant = float(job.predicted.error["overhead_ms"])
        cost = value and expected.expected(family, value, family.mixable, base, constant)
        if cost is None:
            job.show.note(f"{limit} is kept by refusing candidates only: it has no gradient")
            continue
        found.append(
            ExpectedCost(
                cost, target=limit.bound, form="hinge", coefficient=_PRESSURE, name=limit.metric
            )
        )
    return found


def _value(job: Job, limit: Limit) -> expected.Value | None:
    if limit.op != "<=":
        return None
    if limit.metric == "latency_ms":
        return expected.predicted(job.predicted)
    return expected.counted(limit.metric) if limit.metric in expected.COUNTED else None


def _largest(space: Space) -> Candidate:
    largest = space.repair(space.corner(last=True), np.random.default_rng(0))
    return space.decode(largest)[0]


class Drawn(Random):
    """Random search that draws from learned probabilities, the derived candidate first, none twice.

    Decisions without probabilities are as in the derived candidate. Where draws give nothing new
    they get flatter, and in the end uniform. What it is told changes nothing.
    """

    name = "relax"

    def __init__(
        self,
        space: Space,
        seed: int,
        probabilities: Mapping[str, Sequence[float]],
        first: Candidate,
    ) -> None:
        super().__init__(space, seed)
        self._first = np.asarray(space.encode([first]))
        chances = {name: np.asarray(p, dtype=np.float64) for name, p in probabilities.items()}
        self._chances = {space.names.index(name): p / p.sum() for name, p in chances.items()}

    def ask(self, n: int) -> Codes:
        """n candidates as codes; fewer when the space has no others."""
        heat = iter(_FLATTER)
        return self._seen.fresh(n, self.rng, lambda k: self._draw(k, next(heat, _FLATTER[-1])))

    def _draw(self, n: int, heat: float) -> Codes:
        if len(self._seen) == 0:
            n -= 1
        codes: NDArray[Any] = np.repeat(self._first, n, axis=0)
        for column, chances in self._chances.items():
            flat = chances ** (1 / heat)
            codes[:, column] = self.rng.choice(len(flat), size=n, p=flat / flat.sum())
        codes = self.space.canonical(codes)
        codes = codes[self.space.valid(codes)]
        return codes if len(self._seen) else np.concatenate([self._first, codes])
