"""GATES: predicts a ranking from how information flows through a cell (Ning et al., 2020)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from espalier.errors import DataError
from espalier.estimators.predictors.cells import Cell
from espalier.estimators.predictors.inputs import Extras, Reader
from espalier.estimators.predictors.ranking import Learning, learn
from espalier.estimators.predictors.regressor import Regressor
from espalier.estimators.predictors.scale import Scale, labelled
from espalier.estimators.predictors.scorer import Scorer, Shape, encoder, scored
from espalier.estimators.predictors.stored import from_arrays, to_arrays
from espalier.train.seeds import global_seed

Array = NDArray[np.float64]


class Gates(Regressor):
    """An ensemble of scorers over a graph encoder, trained with the pairwise hinge loss.

    `x` are codes of `cell`, or operator graphs (`Graphs`, or codes that `graphs` turns into them);
    `shape.encoder` is the slot: "gates", "gcn" or "flat". The logarithm of the cell's weight count
    is an extra input unless `weights` is False; `extras(codes)` gives more. Scores are ranks'
    stand-ins: `predict` maps their mean to the unit of y by least squares on the training rows.
    Source: https://arxiv.org/abs/2004.01899.
    """

    name = "gates"

    def __init__(
        self,
        cell: Cell | None = None,
        graphs: Callable[[Any], Any] | None = None,
        extras: Extras | None = None,
        shape: Shape = Shape(),
        learning: Learning = Learning(),
        weights: bool = True,
    ) -> None:
        self.shape, self.learning = shape, learning
        self.reader = Reader(cell, graphs, extras, shape.encoder != "gcn", weights)
        self.scorer: Scorer | None = None
        self.scale = Scale()

    def fit(self, x: Any, y: Any, seed: int = 0) -> None:
        """Learns from rows `x` and their values `y` `(n,)`; the more, the better."""
        labels = labelled(y)
        batch = self.reader.fit(x)
        with global_seed(seed):
            self.scorer = self._new()
            truth = torch.from_numpy(labels).float()
            learn(self.scorer, batch, truth, self.learning, seed)
        self.scale = Scale.of(scored(self.scorer, batch).numpy(), labels)

    def scores(self, x: Any) -> Array:
        """Each member's scores `(members, n)`, of mean 0 and spread 1 on the training rows."""
        if self.scorer is None:
            raise DataError("this predictor knows no data yet: call fit first")
        return self.scale.standard(scored(self.scorer, self.reader.read(x)).numpy())

    def predict(self, x: Any) -> tuple[Array, Array]:
        """Mean and standard deviation over the members `(n,)`, in the unit of y."""
        return self.scale.values(self.scores(x))

    def settings(self) -> dict[str, Any]:
        """Sizes and learning, as plain JSON."""
        return {"name": self.name, "shape": asdict(self.shape), "learning": asdict(self.learning)}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What was learnt, as arrays; nothing before `fit`."""
        if self.scorer is None:
            return {}
        return {**to_arrays(self.scorer), **self.reader.arrays(), **self.scale.arrays()}

    def restore(self, arrays: dict[str, NDArray[Any]]) -> None:
        """Takes over what `arrays` gave. Errors: `DataError` when it is of another shape."""
        if not arrays:
            self.scorer = None
            return
        self.reader.restore(arrays)
        self.scorer = from_arrays(self._new(), arrays)
        self.scale = Scale.restored(arrays)

    def _new(self) -> Scorer:
        shape = self.shape
        return Scorer(encoder(self.reader, shape), self.reader.width, shape.hidden, shape.depth)
