"""How much a change of a trained model harms it, seen on a few training examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from espalier.compress.repair.distil import distance
from espalier.errors import EspalierError, unknown
from espalier.estimators.estimator import Estimator
from espalier.estimators.rows import columns, threads
from espalier.nets import Family
from espalier.problem import Metric, Metrics
from espalier.space import Candidate
from espalier.tasks import Task
from espalier.train.running import device_of, evaluating, laid_out
from espalier.train.seeds import generator

Measure = Literal["loss", "divergence", "gradient"]
MEASURES = ("loss", "divergence", "gradient")
_BATCH = 256


class Calibrated(Estimator):
    """Builds each candidate of a trained model and tells its `harm` on `images` of train.

    - "loss": the task's loss.
    - "divergence": how far outputs are from the original's: Kullback-Leibler divergence of the
      classes, a mean over all labels of an example, mean squared error for other targets. Which labels
      are right is not looked at.
    - "gradient": the squared change of the outputs, weighted by the squared gradient of the loss
      there (the diagonal of the empirical Fisher matrix; LeCun et al., 1990).

    The examples are chosen by `seed`, the same for all candidates, and not augmented; validation
    and test are never read. With `recalibrate` batch norms take the statistics of each batch, as
    they would have them after re-estimation: a cut changes what goes into them. Computes on the
    device of the original. A candidate whose outputs are not finite has infinite harm.
    """

    def __init__(
        self,
        family: Family,
        task: Task,
        *,
        measure: Measure = "loss",
        images: int = 512,
        recalibrate: bool = True,
        seed: int = 0,
        threads: int = 1,
    ) -> None:
        if measure not in MEASURES:
            raise EspalierError(unknown("measure of harm", measure, MEASURES))
        if images < 1:
            raise EspalierError(f"harm is measured on 1 image or more, got {images}")
        self.family, self.task = family, task
        self.measure, self.images, self.seed = measure, images, seed
        self.recalibrate, self.threads = recalibrate, threads
        self.metrics = (Metric("harm", "", "min", "estimated", "train"),)
        self._data: list[tuple[Tensor, Tensor]] | None = None
        self._before: list[tuple[Tensor, Tensor]] | None = None  # outputs, squared gradients

    @property
    def samples(self) -> int:
        """How many examples are looked at: `images`, or all there are."""
        return min(self.images, self.task.size("train"))

    def harm(self, candidates: Sequence[Candidate]) -> NDArray[np.float64]:
        """The harm `(n,)` of candidates; that of the original is not 0 where harm is a loss."""
        return np.asarray(self.estimate(candidates)["harm"])

    def estimate(self, candidates: Sequence[Candidate]) -> Metrics:
        """One column, `harm`, a row a candidate, in the order given."""
        with threads(self.threads):
            return columns(self.metrics, [{"harm": self._score(c)} for c in candidates])

    def _score(self, candidate: Candidate) -> float:
        network = self.family.build(candidate)
        data, before = self._loaded(), self._originals()
        network.to(data[0][0].device)
        total, count = 0.0, 0
        with evaluating(network), torch.inference_mode():
            if self.recalibrate:
                _by_batch(network)
            for (x, y), (outputs, weights) in zip(data, before, strict=True):
                after = network(x).float()
                total += float(self._change(after, outputs, weights, y)) * len(y)
                count += len(y)
        return total / count if math.isfinite(total) else math.inf

    def _change(self, after: Tensor, before: Tensor, weights: Tensor, targets: Tensor) -> Tensor:
        """The harm of one batch, a mean over its examples."""
        if self.measure == "loss":
            return self.task.loss(after, targets)
        if self.measure == "gradient":
            return ((after - before).square() * weights).sum() / len(targets)
        return distance(after, before, targets, temperature=1.0)

    def _loaded(self) -> list[tuple[Tensor, Tensor]]:
        """The batches; read once a process, on the device of the original."""
        if self._data is None:
            device, left = device_of(self._original()), self.samples
            self._data = []
            for x, y in self.task.batches("train", min(_BATCH, left), generator(self.seed)):
                if left == 1 and self._data:
                    break  # norms that are set anew need two examples
                self._data.append(
                    (laid_out(self._original(), x[:left].to(device)), y[:left].to(device))
                )
                left -= len(y)
                if left <= 0:
                    break
        return self._data

    def _originals(self) -> list[tuple[Tensor, Tensor]]:
        """The original's outputs, and the squared gradient of each example's loss there."""
        if self._before is None:
            network = self._original()
            self._before = []
            with evaluating(network):
                for x, y in self._loaded():
                    with torch.no_grad():
                        outputs = network(x).float()
                    self._before.append((outputs, self._weights(outputs, y)))
        return self._before

    def _weights(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.measure != "gradient":
            return outputs.new_empty(0)
        leaf = outputs.detach().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(self.task.loss(leaf, targets), leaf)
        # the loss is a mean: each example's own gradient is as many times larger
        return (gradient * len(targets)).square()

    def _original(self) -> nn.Module:
        model: Any = getattr(self.family, "model", None)
        if isinstance(model, nn.Module):
            return model
        space = self.family.space
        original = getattr(self.family, "original", None)
        return self.family.build(original or space.decode(space.corner(True))[0])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_data": None, "_before": None}  # each process reads its own


def _by_batch(network: nn.Module) -> None:
    """Batch norms normalise by the batch at hand."""
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.train()
