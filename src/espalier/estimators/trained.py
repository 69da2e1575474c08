"""Candidates scored by training each one on its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from espalier import train
from espalier.errors import EspalierError
from espalier.estimators.estimator import Estimator
from espalier.estimators.rows import columns, estimated, threads
from espalier.nets import Family
from espalier.problem import Metrics
from espalier.space import Candidate, Option
from espalier.tasks import Split, Task
from espalier.train import Recipe
from espalier.train.seeds import global_seed, mixed


class Trained(Estimator):
    """Builds each candidate, trains it with `recipe` and evaluates it on `split`.

    The seed of a candidate derives from `seed` and its id, so its score does not hang on what
    else was scored. Runs on `threads` threads, one by default: processes go beside each other.
    A candidate that decides `fidelity`, where the family's space does not, is trained for that many
    epochs in place of the recipe's: the seed is that of the network, whatever the level. Every level
    is trained anew with a schedule of its own length; going on from the checkpoint of a lower
    level, whose learning rate has ended at 0, would be another training.
    Raises `Diverged` where the loss becomes NaN.
    """

    def __init__(
        self,
        family: Family,
        task: Task,
        recipe: Recipe,
        seed: int = 0,
        split: Split = "validation",
        threads: int = 1,
        fidelity: str = "epochs",
    ) -> None:
        self.family, self.task, self.recipe = family, task, recipe
        self.fidelity = fidelity
        self.seed, self.split, self.threads = seed, split, threads
        self.metrics = estimated(task, split)

    def estimate(self, candidates: Sequence[Candidate]) -> Metrics:
        """The task's metrics on `split`, a row a candidate, in the order given."""
        with threads(self.threads):
            return columns(self.metrics, [self._score(c) for c in candidates])

    def _score(self, candidate: Candidate) -> dict[str, float]:
        recipe = self.recipe
        if self.fidelity in candidate and self.fidelity not in self.family.space:
            recipe = replace(recipe, epochs=_whole(self.fidelity, candidate[self.fidelity]))
            candidate = Candidate({k: v for k, v in candidate.items() if k != self.fidelity})
        own = mixed(self.seed, int(candidate.id, 16))
        with global_seed(own):
            network = self.family.build(candidate)
        train.fit(network, self.task, recipe, own)
        return train.evaluate(network, self.task, self.split)


def _whole(fidelity: str, level: Option) -> int:
    if isinstance(level, (bool, str)) or level != int(level) or level < 1:
        raise EspalierError(
            f"the fidelity {fidelity!r} is a number of epochs, 1 or more, got {level!r}"
        )
    return int(level)
