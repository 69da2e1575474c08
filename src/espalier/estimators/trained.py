"""Candidates scored by training each one on its own."""

from __future__ import annotations

from collections.abc import Sequence

from espalier import train
from espalier.estimators.estimator import Estimator
from espalier.estimators.rows import columns, estimated, threads
from espalier.nets import Family
from espalier.problem import Metrics
from espalier.space import Candidate
from espalier.tasks import Split, Task
from espalier.train import Recipe
from espalier.train.seeds import global_seed, mixed


class Trained(Estimator):
    """Builds each candidate, trains it with `recipe` and evaluates it on `split`.

    The seed of a candidate derives from `seed` and its id, so its score does not hang on what
    else was scored. Runs on `threads` threads, one by default: processes go beside each other.
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
    ) -> None:
        self.family, self.task, self.recipe = family, task, recipe
        self.seed, self.split, self.threads = seed, split, threads
        self.metrics = estimated(task, split)

    def estimate(self, candidates: Sequence[Candidate]) -> Metrics:
        """The task's metrics on `split`, a row a candidate, in the order given."""
        with threads(self.threads):
            return columns(self.metrics, [self._score(c) for c in candidates])

    def _score(self, candidate: Candidate) -> dict[str, float]:
        own = mixed(self.seed, int(candidate.id, 16))
        with global_seed(own):
            network = self.family.build(candidate)
        train.fit(network, self.task, self.recipe, own)
        return train.evaluate(network, self.task, self.split)
