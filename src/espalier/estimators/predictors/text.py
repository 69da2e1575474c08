"""A ranking learnt from networks as text: the lines of their operators, read by a small encoder.

After ONNX-Net, which predicts accuracy from text made of ONNX files; see `opgraph` for the lines.
Ours has no pretrained language model: tokens are embedded, a line is the mean of its tokens, and
convolutions over the lines and their mean and maximum give the score.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.errors import DataError
from espalier.estimators.predictors.inputs import Batch
from espalier.estimators.predictors.ranking import Learning, learn
from espalier.estimators.predictors.regressor import Regressor
from espalier.estimators.predictors.scale import Scale, labelled
from espalier.estimators.predictors.scorer import scored
from espalier.estimators.predictors.stored import from_arrays, to_arrays
from espalier.train.seeds import global_seed

Array = NDArray[np.float64]
_WORDS = re.compile(r"[A-Za-z_]+|\d+")
_ROWS = 256


@dataclass(frozen=True)
class Reading:
    """`buckets` of tokens, `tokens` read of a line and `lines` of a network, `width` of all
    vectors, `layers` of convolutions over the lines."""

    buckets: int = 512
    tokens: int = 24
    lines: int = 128
    width: int = 32
    layers: int = 2


def tokens(line: str) -> list[str]:
    """Words of a line; a number is its size to the nearest half power of two, behind its place.

    "Conv(group=1, w16x3x3x3)->16x8x8" reads conv, group, #0, w, #8, #3, ...: so that widths that a
    model never saw are near to those that it did.
    """
    found = []
    for word in _WORDS.findall(line):
        if word.isdigit():
            found.append(f"#{round(2 * math.log2(int(word))) if int(word) else '-'}")
        elif word != "x":
            found.append(word.lower())
    return found


class _Reader(nn.Module):
    """Scores `(1, n)` of token numbers `(n, lines, tokens)`."""

    def __init__(self, reading: Reading) -> None:
        super().__init__()
        width = reading.width
        self.words = nn.Embedding(reading.buckets + 1, width, padding_idx=0)
        self.places = nn.Parameter(torch.zeros(reading.tokens, width))
        nn.init.normal_(self.places, 1.0, 0.3)
        self.layers = nn.ModuleList(
            nn.Conv1d(width, width, 3, padding=1) for _ in range(reading.layers)
        )
        self.head = nn.Sequential(nn.Linear(2 * width + 1, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, batch: Batch) -> Tensor:
        """Scores `(1, n)`."""
        (numbers,) = batch.graphs
        some = (numbers > 0).float()
        words = self.words(numbers) * self.places  # a number means another thing elsewhere
        line = words.sum(2) / some.sum(2, keepdim=True).clamp(min=1).sqrt()
        real = (some.sum(2) > 0).float().unsqueeze(1)
        h = line.transpose(1, 2)
        for layer in self.layers:
            h = (h + F.relu(layer(h))) * real
        count = real.sum(2)
        mean = h.sum(2) / count.clamp(min=1)
        most = h.masked_fill(real == 0, -1e4).amax(2)
        out: Tensor = self.head(torch.cat([mean, most, count.log1p() / 5], 1))
        return out.T


class TextRanker(Regressor):
    """Learns a ranking from the lines of networks; `x` is a sequence of sequences of lines.

    `fit` goes on from what was learnt before when `warm` is set. A seed, one predictor. `predict`
    has no spread. Errors: `DataError`.
    """

    name = "text"

    def __init__(
        self,
        reading: Reading = Reading(),
        learning: Learning = Learning(batch=64, rate=2e-3),
        warm: bool = False,
    ) -> None:
        self.reading, self.learning, self.warm = reading, learning, warm
        self.network: _Reader | None = None
        self.scale = Scale()

    def fit(self, x: Any, y: Any, seed: int = 0) -> None:
        """Learns from networks' lines and their values `y` `(n,)`."""
        labels, batch = labelled(y), self.read(x)
        with global_seed(seed):
            if self.network is None or not self.warm:
                self.network = _Reader(self.reading)
            learn(self.network, batch, torch.from_numpy(labels).float(), self.learning, seed)
        self.scale = Scale.of(self._scores(batch), labels)

    def predict(self, x: Any) -> tuple[Array, Array]:
        """Values `(n,)` in the unit of y; the spread is not known and is 0."""
        return self.scale.values(self.scale.standard(self._scores(self.read(x))))

    def read(self, x: Sequence[Sequence[str]]) -> Batch:
        """Lines as token numbers; what is over the reading's sizes is left out."""
        reading = self.reading
        if not len(x):
            raise DataError("there is no network to read: give the lines of at least one")
        out = np.zeros((len(x), reading.lines, reading.tokens), dtype=np.int64)
        known: dict[str, list[int]] = {}
        for i, lines in enumerate(x):
            for j, line in enumerate(lines[: reading.lines]):
                if line not in known:
                    known[line] = [
                        zlib.crc32(t.encode()) % reading.buckets + 1
                        for t in tokens(line)[: reading.tokens]
                    ]
                out[i, j, : len(known[line])] = known[line]
        return Batch((torch.from_numpy(out),))

    def _scores(self, batch: Batch) -> Array:
        if self.network is None:
            raise DataError("this predictor knows no data yet: call fit first")
        return np.asarray(scored(self.network.eval(), batch, _ROWS).double().numpy())

    def settings(self) -> dict[str, Any]:
        """Sizes and learning, as plain JSON."""
        return {
            "name": self.name,
            "reading": asdict(self.reading),
            "learning": asdict(self.learning),
            "warm": self.warm,
        }

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What was learnt, as arrays."""
        if self.network is None:
            return {}
        return {**to_arrays(self.network), **self.scale.arrays()}

    def restore(self, arrays: dict[str, NDArray[Any]]) -> None:
        """Takes over what `arrays` gave."""
        self.network = None
        if arrays:
            self.network = from_arrays(_Reader(self.reading), arrays)
            self.scale = Scale.restored(arrays)
