"""An ensemble of small neural networks, trained side by side.

Deep ensembles: Lakshminarayanan, Pritzel & Blundell, 2017; as the predictor of a search: BANANAS
(White, Neiswanger & Savani, 2021).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from espalier.errors import DataError
from espalier.estimators.predictors.regressor import Array, Regressor, checked


@dataclass
class MLP(Regressor):
    """Members that differ in their first weights and in their batches; trained by AdamW.

    - `members`, `width`, `depth`: how many networks, units a layer, hidden layers.
    - `steps`, `batch`, `rate`, `decay`: of the training.
    """

    members: int = 5
    width: int = 32
    depth: int = 2
    steps: int = 300
    batch: int = 32
    rate: float = 0.01
    decay: float = 0.01
    name: ClassVar[str] = "mlp"
    growth: ClassVar[float] = 1.05

    def __post_init__(self) -> None:
        self._layers: list[tuple[Tensor, Tensor]] = []
        self._unit = np.zeros((4, 0))  # of features: shift and scale; of values: the same

    def fit(self, x: Array, y: Array, seed: int = 0) -> None:
        """Trains all members at once."""
        x, y = checked(x, y)
        noise = torch.Generator().manual_seed(seed)
        self._unit = _units(x, y)
        inputs, targets = self._inputs(x), torch.from_numpy(y - self._unit[2, 0]).float()
        targets = targets / float(self._unit[3, 0])
        sizes = [x.shape[1], *[self.width] * self.depth, 1]
        self._layers = []
        for fan, out in pairwise(sizes):
            drawn = torch.randn(self.members, fan, out, generator=noise) * (2 / fan) ** 0.5
            self._layers.append((drawn, torch.zeros(self.members, 1, out)))
        weights = [t.requires_grad_() for layer in self._layers for t in layer]
        adam = torch.optim.AdamW(weights, lr=self.rate, weight_decay=self.decay)
        calendar = torch.optim.lr_scheduler.CosineAnnealingLR(adam, self.steps)
        size = min(self.batch, len(x))
        for _ in range(self.steps):
            rows = torch.randint(len(x), (self.members, size), generator=noise)
            loss = (self._forward(inputs[rows]) - targets[rows]).square().mean(1).sum()
            adam.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            adam.step()
            calendar.step()
        self._layers = [(w.detach(), b.detach()) for w, b in self._layers]

    def _inputs(self, x: Array) -> Tensor:
        return torch.from_numpy((x - self._unit[0]) / self._unit[1]).float()

    def _forward(self, x: Tensor) -> Tensor:
        """`(members, n, k)` to `(members, n)`."""
        for weight, bias in self._layers[:-1]:
            x = torch.relu(torch.baddbmm(bias, x, weight))
        weight, bias = self._layers[-1]
        return torch.baddbmm(bias, x, weight)[..., 0]

    def predict(self, x: Array) -> tuple[Array, Array]:
        """Mean and deviation over the members."""
        if not self._layers:
            raise DataError("a regressor is fitted before it predicts: call fit")
        inputs = self._inputs(np.ascontiguousarray(x, dtype=np.float64))
        with torch.inference_mode():
            each = self._forward(inputs.expand(self.members, -1, -1)).double().numpy()
        each = self._unit[2, 0] + self._unit[3, 0] * each
        return each.mean(axis=0), each.std(axis=0)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The weights of all layers, and the units of features and values."""
        out = {"unit": self._unit}
        for i, (weight, bias) in enumerate(self._layers):
            out[f"weight{i}"], out[f"bias{i}"] = weight.numpy(), bias.numpy()
        return out

    def restore(self, arrays: dict[str, NDArray[Any]]) -> None:
        """Takes the weights over."""
        self._unit = arrays["unit"]
        count = sum(name.startswith("weight") for name in arrays)
        self._layers = [
            (torch.from_numpy(arrays[f"weight{i}"]), torch.from_numpy(arrays[f"bias{i}"]))
            for i in range(count)
        ]


def _units(x: Array, y: Array) -> Array:
    """Rows: shift and scale of the features; shift and scale of the values, repeated."""
    scale, unit = x.std(axis=0), float(y.std())
    ones = np.ones(x.shape[1])
    return np.stack(
        [
            x.mean(axis=0),
            np.where(scale > 1e-9, scale, 1.0),
            ones * y.mean(),
            ones * (unit if unit > 1e-12 else 1.0),
        ]
    )
