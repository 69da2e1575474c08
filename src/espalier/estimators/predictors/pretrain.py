"""A predictor that knows what is free before it sees a label: FBNetV3's pretraining.

Dai, Wan, Zhang, Wu, He, Wei, Chen, Tian, Yu, Vajda & Gonzalez, "FBNetV3: Joint Architecture-Recipe
Search using Predictor Pretraining" (CVPR 2021), https://arxiv.org/abs/2006.02049. An encoder of the
architecture first learns statistics that cost nothing (parameters, multiply-accumulates), of as
many architectures as one likes; then a head on the encoding and the training recipe learns accuracy
from the few labels there are. What differs: several members, whose spread is the uncertainty.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.nn import functional

from espalier.errors import DataError, EspalierError
from espalier.estimators.predictors.encoders import Affine
from espalier.estimators.predictors.regressor import Array, Regressor, checked
from espalier.estimators.predictors.stored import from_arrays, to_arrays

_LEAST = {"members": 1, "width": 1, "steps": 1, "batch": 2, "free_steps": 0, "frozen": 0}


@dataclass
class Pretrained(Regressor):
    """A perceptron ensemble; `pretrain` comes before `fit`, and tells it which columns describe
    the architecture.

    - `members`, `width`: networks side by side, units of every hidden layer.
    - `free_steps`: of AdamW on the statistics. 0: the encoder starts at random, as any other.
    - `steps`: on the labels; in the first `frozen` of them a pretrained encoder stays as it is.
    - `rate`: the peak learning rate; `tune`: its share for a pretrained encoder.
    - `decay`, `batch`: weight decay, and rows a step.
    """

    members: int = 5
    width: int = 64
    free_steps: int = 400
    steps: int = 200
    frozen: int = 100
    rate: float = 5e-3
    tune: float = 0.1
    decay: float = 1e-2
    batch: int = 256
    name: ClassVar[str] = "pretrained"
    growth: ClassVar[float] = 1.05

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise EspalierError(f"{name} must be {least} or more, got {getattr(self, name)!r}")
        self._free = self._statistics = np.zeros((0, 0))
        self._encoders: dict[int, dict[str, Tensor]] = {}
        self._network: _Network | None = None
        self._scale = np.array([0.0, 1.0])

    def pretrain(self, free: ArrayLike, statistics: ArrayLike) -> Pretrained:
        """Takes what is known for free; learnt at the next `fit`. Gives itself.

        `free` `(m, a)`: features of architectures, any number of them; in the features `(n, k)` of
        `fit` the first a columns are of this kind, the others describe the training. `statistics`
        `(m, s)`: positive numbers, of which the logarithms are learnt.
        Errors: `DataError` for rows that don't match, or numbers that are not finite or positive.
        """
        features = np.asarray(free, dtype=np.float64)
        known = np.asarray(statistics, dtype=np.float64).reshape(len(features), -1)
        if features.ndim != 2 or not len(features) or not known.shape[1]:
            raise DataError(
                "pretraining takes features (m, a) and statistics (m, s), at least one row, got "
                f"{features.shape} and {np.shape(statistics)}"
            )
        if not np.isfinite(features).all() or not (np.isfinite(known) & (known > 0)).all():
            raise DataError("pretraining takes finite features, and statistics above 0")
        logs = np.log(known)
        spread = logs.std(axis=0)
        self._free = features
        self._statistics = (logs - logs.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
        self._encoders = {}
        return self

    def fit(self, x: Array, y: Array, seed: int = 0) -> None:
        """Learns labels `(n,)` of features `(n, k)`. Errors: `DataError` before `pretrain`."""
        x, y = checked(x, y)
        if not len(self._free):
            raise DataError("a pretrained predictor needs free statistics first: call pretrain")
        if x.shape[1] < self._free.shape[1]:
            raise DataError(
                f"the first {self._free.shape[1]} columns describe the architecture, got features "
                f"of shape {x.shape}"
            )
        spread = float(y.std())
        self._scale = np.array([y.mean(), spread if spread > 0 else 1.0])
        labels = torch.from_numpy((y - self._scale[0]) / self._scale[1]).float()
        order = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = self._made(x.shape[1], self._free.shape[1], self._statistics.shape[1])
        if self.free_steps:
            if seed not in self._encoders:  # a search fits again and again: what is free is kept
                self._learn_statistics(network, order)
                self._encoders = {seed: {k: v.clone() for k, v in _state(network.encoder)}}
            network.encoder.load_state_dict(self._encoders[seed])
        order.manual_seed(seed + 1)  # the same whether the encoder was kept or not
        self._learn_labels(network, torch.from_numpy(x).float(), labels, order)
        self._network = network.eval()

    def predict(self, x: Array) -> tuple[Array, Array]:
        """Mean and standard deviation over the members `(n,)`, in the labels' unit."""
        if self._network is None:
            raise DataError("a regressor is fitted before it predicts: call fit")
        with torch.inference_mode():
            inputs = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float64)).float()
            found = self._network(inputs).double().numpy()
        mean, spread = self._scale
        return mean + spread * found.mean(axis=0), spread * found.std(axis=0)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The weights and the sizes of the network, and the labels' scale."""
        if self._network is None:
            raise DataError("a regressor is fitted before it is saved: call fit")
        sizes = np.array(self._network.sizes, dtype=np.int64)
        return {**to_arrays(self._network), "sizes": sizes, "scale": self._scale}

    def restore(self, arrays: dict[str, NDArray[Any]]) -> None:
        """Takes the weights over: it predicts the same; to learn more it must be pretrained."""
        self._network = from_arrays(self._made(*map(int, arrays["sizes"])), arrays)
        self._scale = np.asarray(arrays["scale"], dtype=np.float64)

    def _made(self, inputs: int, free: int, statistics: int) -> _Network:
        return _Network((inputs, free, statistics), self.members, self.width)

    def _learn_statistics(self, network: _Network, order: torch.Generator) -> None:
        """Trains the encoder, under a linear layer that is thrown away, on the statistics."""
        free = torch.from_numpy(self._free).float()
        truth = torch.from_numpy(self._statistics).float()

        def loss(rows: Tensor) -> Tensor:
            found = network.statistics(network.encoder(free[rows]))
            return functional.mse_loss(found, truth[rows].expand_as(found))

        parameters = [*network.encoder.parameters(), *network.statistics.parameters()]
        self._learn([{"params": parameters}], self.free_steps, len(free), loss, order)

    def _learn_labels(
        self, network: _Network, x: Tensor, y: Tensor, order: torch.Generator
    ) -> None:
        """Trains the head with Huber's loss, and the encoder from when it thaws."""
        head: dict[str, Any] = {"params": list(network.head.parameters())}
        encoder: dict[str, Any] = {"params": list(network.encoder.parameters())}
        if self.free_steps:
            encoder.update({"share": self.tune, "begin": self.frozen})

        def loss(rows: Tensor) -> Tensor:
            found = network(x[rows])
            return functional.huber_loss(found, y[rows].expand_as(found))

        self._learn([head, encoder], self.steps, len(x), loss, order)

    def _learn(
        self,
        groups: list[dict[str, Any]],
        steps: int,
        rows: int,
        loss: Callable[[Tensor], Tensor],
        order: torch.Generator,
    ) -> None:
        """AdamW, the rate falling by half a cosine; a group may have a share of it, from a step."""
        learner = torch.optim.AdamW(groups, lr=self.rate, weight_decay=self.decay)
        for step in range(steps):
            rate = self.rate * 0.5 * (1 + np.cos(np.pi * step / steps))
            for group in learner.param_groups:
                group["lr"] = rate * group.get("share", 1.0) * (step >= group.get("begin", 0))
            some = torch.randperm(rows, generator=order)[: self.batch]
            learner.zero_grad(set_to_none=True)
            loss(some).backward()  # type: ignore[no-untyped-call]
            learner.step()


class _Network(nn.Module):
    """The encoder, a linear layer for the statistics, and a head for the labels."""

    def __init__(self, sizes: tuple[int, int, int], members: int, width: int) -> None:
        super().__init__()
        self.sizes = inputs, free, statistics = sizes
        self.encoder = nn.Sequential(
            Affine(members, free, width), nn.ReLU(), Affine(members, width, width), nn.ReLU()
        )
        self.statistics = Affine(members, width, statistics)
        self.head = nn.Sequential(
            Affine(members, width + inputs - free, width), nn.ReLU(), Affine(members, width, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Scores `(members, n)`."""
        free = self.sizes[1]
        coded = self.encoder(x[:, :free])
        recipe = x[:, free:].expand(len(coded), -1, -1)
        out: Tensor = self.head(torch.cat([coded, recipe], dim=2))
        return out.squeeze(2)


def _state(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, value.detach()) for name, value in module.state_dict().items()]
