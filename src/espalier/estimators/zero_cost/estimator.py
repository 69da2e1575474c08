"""Candidates scored without training, by zero-cost proxies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from espalier.errors import EspalierError, unknown
from espalier.estimators.estimator import Estimator
from espalier.estimators.rows import columns, threads
from espalier.estimators.zero_cost.scores import ALL, MEASURES, scores
from espalier.nets import Family
from espalier.problem import How, Metric, Metrics
from espalier.space import Candidate
from espalier.tasks import Task
from espalier.train.seeds import generator, global_seed, mixed

_COUNTED = ("params", "macs", "depth_entropy")  # no weights, no data


class ZeroCost(Estimator):
    """Builds each candidate with fresh weights and scores it on one batch of train.

    The weights of a candidate derive from `seed` and its id; the batch, `batch` images chosen by
    `seed` and not augmented, is the same for all. Every metric is to be maximised.
    Runs on `threads` threads, one by default: processes go beside each other.
    Errors: `EspalierError` as of `scores`.
    """

    def __init__(
        self,
        family: Family,
        task: Task,
        measures: Sequence[str] = ALL,
        batch: int = 64,
        seed: int = 0,
        threads: int = 1,
    ) -> None:
        for name in measures:
            if name not in MEASURES:
                raise EspalierError(unknown("zero-cost measure", name, MEASURES))
        if not measures or batch < 4:
            raise EspalierError(
                f"zero-cost proxies need a measure and a batch of 4 or more, got "
                f"{len(measures)} measures and batch={batch}"
            )
        self.family, self.task, self.measures = family, task, tuple(measures)
        self.batch, self.seed, self.threads = batch, seed, threads
        self.metrics = tuple(_metric(name) for name in measures)
        self._data: tuple[Tensor, Tensor] | None = None

    def estimate(self, candidates: Sequence[Candidate]) -> Metrics:
        """The measures, a row a candidate, in the order given; each candidate scored once."""
        with threads(self.threads):
            found = {c: self._score(c) for c in dict.fromkeys(candidates)}
        return columns(self.metrics, [found[c] for c in candidates])

    def _score(self, candidate: Candidate) -> dict[str, float]:
        inputs, labels = self._loaded()
        with global_seed(mixed(self.seed, int(candidate.id, 16))):
            network = self.family.build(candidate)
        return scores(network, inputs, labels, self.measures, self.task.loss, self.seed)

    def _loaded(self) -> tuple[Tensor, Tensor]:
        """The batch; read once a process."""
        if self._data is None:
            self._data = next(iter(self.task.batches("train", self.batch, generator(self.seed))))
        return self._data

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_data": None}  # each process reads its own


def _metric(name: str) -> Metric:
    how: How = "counted" if name in _COUNTED else "estimated"
    return Metric(name, "", "max", how, "" if how == "counted" else "train")
