"""The solver "relax" of a shrink: masks learn which channels stay; then the nearest that fits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file

from espalier import train
from espalier.errors import EspalierError
from espalier.flows.fitting import Solve
from espalier.flows.shrinking import Shrinking
from espalier.flows.solving import paced, program_on
from espalier.flows.speed import FewBatches, timed_second
from espalier.solvers.allocate import Factor
from espalier.solvers.prune import Pruned, bip, dsa, pas
from espalier.solvers.prune.methods import SETTINGS
from espalier.train import Recipe
from espalier.train.halves import halves

_SHARE = 0.3  # of the time, for masks that learn
_LEAST_STEPS = 8  # however little time there is
_ALMOST = 0.95  # of a pass is a whole one


@dataclass(frozen=True)
class Method:
    """A published way for masks to learn. `dearer`: an epoch of it against one of weights alone."""

    prune: Callable[..., Pruned]
    dearer: float


METHODS: dict[str, Method] = {
    "relax": Method(dsa, 3.0),
    "relax:pas": Method(pas, 2.0),
    "relax:bip": Method(bip, 2.0),
}
_MORE = 0.1  # keeping more than was learned is no harm but for the cost: a little, to break ties


def check_masks(names: Sequence[str], solver: str) -> None:
    """Refuses decisions, by their names, that no mask can learn. Errors: `EspalierError`."""
    kinds = {name.partition(":")[0] for name in names}
    if "width" not in kinds:
        raise EspalierError(
            f"solver {solver!r} learns which channels stay: add 'width' to the decisions, or take "
            "solver='allocate'"
        )
    if others := kinds & {"bits", "sparsity"}:
        raise EspalierError(
            f"solver {solver!r} learns which channels stay, not "
            f"{' or '.join(sorted(others))}: leave that out of the decisions, or take "
            "solver='allocate'"
        )


def relaxing(job: Shrinking, solver: str) -> Solve:
    """Masks learn within the limits, once; each answer is the candidate nearest to what was learned
    that keeps the limits, solved exactly.

    The learned order of channels becomes the family's. No mask is on a block: one goes only where
    channels alone do not keep a limit.
    """
    method = METHODS[solver]
    path = job.study.folder / "gates-scores.safetensors"

    def learn() -> dict[str, Any]:
        passes = float(job.study.once("gate epochs", lambda: _epochs(job, method.dearer)))
        epochs, task = max(int(passes), 1), job.task
        if passes < 1:  # of as much of train as there is time for
            task = halves(task, passes, job.seed)[1]
        job.show.phase("masks learn which channels stay", epochs)
        found = method.prune(
            job.family,
            task,
            paced(job),
            priced=[job.predicted] if job.predicted else (),
            settings=replace(SETTINGS, epochs=epochs),
            seed=job.seed,
            checkpoint=job.study.folder / "gates.safetensors",
            progress=job.show.step,
        )
        scores = {n.removeprefix("width:"): s.contiguous() for n, s in found.scores.items()}
        save_file(scores, path)
        return found.candidate.to_json()

    learned = job.study.once("gates", learn)
    job.family = job.family.with_scores(load_file(path))
    job.calibrated = job.judging(job.calibrated.images)
    return program_on(job, _distances(job, learned))


def _epochs(job: Shrinking, dearer: float) -> float:
    """Passes over train that masks have time for; less than one is a part of train."""
    if job.budget.seconds is None:
        return SETTINGS.epochs
    probe, few = copy.deepcopy(job.family.model), FewBatches(job.task, 4)
    recipe = Recipe(epochs=1, batch=SETTINGS.batch, lr=1e-4)
    steps = max(job.task.size("train") // SETTINGS.batch, 1)
    seconds = timed_second(lambda: train.fit(probe, few, recipe, 0), 1) * steps / min(4, steps)
    passes = _SHARE * job.budget.seconds / (dearer * seconds)
    passes = max(passes, _LEAST_STEPS / steps)
    return passes if passes < _ALMOST else float(np.clip(int(passes), 1, SETTINGS.epochs))


def _distances(job: Shrinking, learned: Mapping[str, Any]) -> list[Factor]:
    """How far each option is from what was learned, as a share of the original's."""
    factors = []
    for decision in job.family.space.decisions:
        options = np.array(decision.options, dtype=float)
        target = float(learned.get(decision.name, options[-1]))
        away = (target - options) / abs(options[-1])
        values = np.where(away > 0, away, -_MORE * away)
        factors.append(Factor((decision.name,), values, name=decision.name))
    return factors
