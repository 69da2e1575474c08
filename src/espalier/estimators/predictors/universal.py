"""One predictor for many spaces: operator graphs, contrastive learning, fuzzy clusters of heads.

Mills et al., "GENNAPE: Towards Generalized Neural Architecture Performance Estimators" (AAAI 2023),
https://arxiv.org/abs/2211.17226. An encoder of operator graphs first learns, without labels, to put
networks near each other whose graphs have similar spectra; fuzzy C-means then gives every network
its memberships in clusters, and a head a cluster learns the ranking. Ours is small: mean
aggregation both ways along the edges in place of a k-GNN and a transformer.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.errors import DataError
from espalier.estimators.predictors.encoders import Affine
from espalier.estimators.predictors.inputs import Batch
from espalier.estimators.predictors.opgraph import NUMBERS, OpGraphs
from espalier.estimators.predictors.ranking import Learning, learn
from espalier.estimators.predictors.regressor import Regressor
from espalier.estimators.predictors.scale import Scale, labelled
from espalier.estimators.predictors.scorer import scored
from espalier.estimators.predictors.stored import from_arrays, to_arrays
from espalier.train.seeds import global_seed

Array = NDArray[np.float64]
_ROWS = 256  # graphs at once


@dataclass(frozen=True)
class Sizes:
    """`width` of nodes and embeddings, `layers` of the encoder, `clusters` of heads with `hidden`
    units; contrastive `steps` (0: none) at `temperature`, on `batch` graphs; `bandwidth` of the
    spectral similarity; `flops`: whether the heads are told the multiply-accumulates."""

    width: int = 32
    layers: int = 4
    clusters: int = 4
    hidden: int = 32
    steps: int = 150
    batch: int = 64
    temperature: float = 0.1
    bandwidth: float = 0.05
    flops: bool = True


class GraphEncoder(nn.Module):
    """Embeds operator graphs `(n, width)`: what feeds a node, what it feeds, and itself, mixed."""

    def __init__(self, kinds: int, width: int, layers: int) -> None:
        super().__init__()
        self.kinds = nn.Embedding(kinds, width, padding_idx=0)
        self.numbers = nn.Linear(len(NUMBERS), width)
        self.mix = nn.ModuleList(nn.Linear(3 * width, width) for _ in range(layers))
        self.norm = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.last = nn.Linear(2 * width, width)

    def forward(self, operators: Tensor, numbers: Tensor, adjacency: Tensor) -> Tensor:
        """Embeddings of `operators (n, v)`, `numbers (n, v, k)`, `adjacency (n, v, v)`."""
        real = (operators > 0).unsqueeze(2).float()
        h = (self.kinds(operators) + self.numbers(numbers)) * real
        into = adjacency.transpose(1, 2)
        into = into / into.sum(2, keepdim=True).clamp(min=1)
        out = adjacency / adjacency.sum(2, keepdim=True).clamp(min=1)
        for mix, norm in zip(self.mix, self.norm, strict=True):
            h = (h + F.relu(norm(mix(torch.cat([h, into @ h, out @ h], 2))))) * real
        mean = h.sum(1) / real.sum(1).clamp(min=1)
        most = h.masked_fill(real == 0, -1e4).amax(1)
        embedded: Tensor = self.last(torch.cat([mean, most], 1))
        return embedded


class _Network(nn.Module):
    """Encoder, centres of the clusters, and a head each."""

    def __init__(self, kinds: int, sizes: Sizes) -> None:
        super().__init__()
        self.flops = sizes.flops
        self.encoder = GraphEncoder(kinds, sizes.width, sizes.layers)
        inputs = sizes.width + int(sizes.flops)
        self.hidden = Affine(sizes.clusters, inputs, sizes.hidden)
        self.head = Affine(sizes.clusters, sizes.hidden, 1)
        self.register_buffer("centres", torch.zeros(sizes.clusters, sizes.width))
        self.register_buffer("shift", torch.zeros(len(NUMBERS)))
        self.register_buffer("unit", torch.ones(len(NUMBERS)))

    def embed(self, batch: Batch) -> Tensor:
        """Embeddings `(n, width)`, of length 1."""
        operators, numbers, adjacency = batch.graphs
        scaled = (numbers - self.get_buffer("shift")) / self.get_buffer("unit")
        return F.normalize(self.encoder(operators, scaled, adjacency), dim=1)

    def forward(self, batch: Batch) -> Tensor:
        """Scores `(1, n)`: every head's, weighted by the memberships."""
        z = self.embed(batch)
        member = memberships(z, self.get_buffer("centres"))
        told = z
        if self.flops and batch.extras is not None:
            told = torch.cat([z, batch.extras], 1)
        scores = self.head(F.relu(self.hidden(told))).squeeze(2)
        mixed: Tensor = (scores * member.T).sum(0, keepdim=True)
        return mixed


class Universal(Regressor):
    """Ranks networks of any space by their operator graphs.

    `pretrain(graphs)` needs no labels; give it graphs of every space that is to be ranked. `fit`
    learns from labels of one space, starting from what is there: call it on a space with many
    labels, then, if any are known, on the space of interest. The multiply-accumulates are
    standardised among the graphs given together, so that spaces of other sizes are on one scale:
    predict many networks of one space at once. A seed, one predictor. Errors: `DataError`.
    """

    name = "universal"

    def __init__(
        self, kinds: int, sizes: Sizes = Sizes(), learning: Learning = Learning(batch=64)
    ) -> None:
        self.kinds, self.sizes, self.learning = kinds, sizes, learning
        self.network: _Network | None = None
        self.scale = Scale()

    def pretrain(self, graphs: OpGraphs, seed: int = 0) -> None:
        """Learns embeddings and clusters from graphs alone; what was learnt before is forgotten."""
        sizes = self.sizes
        with global_seed(seed):
            network = _Network(self.kinds, sizes)
            real = graphs.numbers[graphs.operators > 0]
            network.get_buffer("shift").copy_(torch.from_numpy(real.mean(0)))
            network.get_buffer("unit").copy_(torch.from_numpy(np.maximum(real.std(0), 1e-3)))
            batch = read(graphs)
            if sizes.steps:
                near = torch.from_numpy(similarity(spectra(graphs), sizes.bandwidth)).float()
                _contrast(network, batch, near, sizes, seed)
            embedded = _embedded(network, batch)
            network.get_buffer("centres").copy_(centres(embedded, sizes.clusters, seed))
        self.network, self.scale = network, Scale()

    def fit(self, x: Any, y: Any, seed: int = 0) -> None:
        """Learns the ranking of graphs `x` by their values `y`, from where the network stands."""
        labels = labelled(y)
        if self.network is None:
            self.pretrain(x, seed)
        assert self.network is not None
        network = deepcopy(self.network)
        batch = read(x)
        with global_seed(seed):
            learn(network, batch, torch.from_numpy(labels).float(), self.learning, seed)
        self.network = network
        self.scale = Scale.of(self._scores(batch), labels)

    def predict(self, x: Any) -> tuple[Array, Array]:
        """Values `(n,)` in the unit of the last labels; the spread is not known and is 0."""
        return self.scale.values(self.scale.standard(self._scores(read(x))))

    def _scores(self, batch: Batch) -> Array:
        if self.network is None:
            raise DataError("this predictor knows no data yet: call pretrain or fit first")
        return np.asarray(scored(self.network.eval(), batch, _ROWS).double().numpy())

    def settings(self) -> dict[str, Any]:
        """Sizes and learning, as plain JSON."""
        return {
            "name": self.name,
            "kinds": self.kinds,
            "sizes": asdict(self.sizes),
            "learning": asdict(self.learning),
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
            self.network = from_arrays(_Network(self.kinds, self.sizes), arrays)
            self.scale = Scale.restored(arrays)


def read(graphs: OpGraphs) -> Batch:
    """Graphs as tensors, with the logarithm of their multiply-accumulates, standardised."""
    cost = np.log1p(graphs.macs)
    spread = cost.std()
    cost = (cost - cost.mean()) / (spread if spread > 0 else 1.0)
    return Batch(
        (
            torch.from_numpy(graphs.operators),
            torch.from_numpy(graphs.numbers).float(),
            torch.from_numpy(graphs.adjacency).float(),
        ),
        torch.from_numpy(cost[:, None]).float(),
    )


def spectra(graphs: OpGraphs, points: int = 16) -> Array:
    """Eigenvalues of each graph's normalised Laplacian, at `points` quantiles `(n, points)`.

    The edges' direction is forgotten; the values lie in 0..2, whatever the graph's size.
    """
    out = np.zeros((len(graphs), points))
    for i in range(len(graphs)):
        size = int((graphs.operators[i] > 0).sum())
        joined = graphs.adjacency[i, :size, :size]
        joined = (joined | joined.T).astype(np.float64)
        degree = np.maximum(joined.sum(1), 1.0)
        laplacian = np.eye(size) - joined / np.sqrt(degree[:, None] * degree)
        out[i] = np.quantile(np.linalg.eigvalsh(laplacian), np.linspace(0, 1, points))
    return out


def similarity(spectrum: Array, bandwidth: float) -> Array:
    """exp(-mean squared difference / bandwidth^2) of spectra `(n, k)`: `(n, n)`, 0 on the diagonal."""
    gaps = ((spectrum[:, None] - spectrum) ** 2).mean(2)
    near = np.exp(-gaps / bandwidth**2)
    np.fill_diagonal(near, 0.0)
    return np.asarray(near)


def contrast(embedded: Tensor, near: Tensor, temperature: float) -> Tensor:
    """Contrastive loss: cross-entropy of where a graph's neighbours are, against where they should
    be. `embedded (n, d)` of length 1; `near (n, n)` weighs the positives of each row."""
    n = len(embedded)
    alike = embedded @ embedded.T / temperature
    alike = alike.masked_fill(torch.eye(n, dtype=torch.bool), -1e9)
    share = near / near.sum(1, keepdim=True).clamp(min=1e-9)
    return -(share * torch.log_softmax(alike, 1)).sum(1).mean()


def _contrast(network: _Network, batch: Batch, near: Tensor, sizes: Sizes, seed: int) -> None:
    order = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(network.encoder.parameters(), lr=2e-3, weight_decay=1e-4)
    for _ in range(sizes.steps):
        rows = torch.randperm(len(batch), generator=order)[: sizes.batch]
        z = network.embed(batch.take(rows))
        loss = contrast(z, near[rows][:, rows], sizes.temperature)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()


def _embedded(network: _Network, batch: Batch) -> Tensor:
    with torch.no_grad():
        parts = [
            network.embed(batch.take(slice(i, i + _ROWS))) for i in range(0, len(batch), _ROWS)
        ]
    return torch.cat(parts)


def memberships(z: Tensor, centres: Tensor) -> Tensor:
    """Fuzzy memberships `(n, c)`, sums of 1: inverse squared distances (C-means of fuzzifier 2)."""
    near = 1 / ((z.unsqueeze(1) - centres) ** 2).sum(2).clamp(min=1e-6)
    return near / near.sum(1, keepdim=True)


def centres(z: Tensor, clusters: int, seed: int, rounds: int = 50) -> Tensor:
    """Centres `(clusters, d)` by fuzzy C-means (Bezdek, 1981), from rows drawn by `seed`."""
    start = torch.Generator().manual_seed(seed)
    found = z[torch.randint(len(z), (clusters,), generator=start)]
    found = found + 1e-3 * torch.randn(found.shape, generator=start)
    for _ in range(rounds):
        weight = memberships(z, found) ** 2
        found = (weight.T @ z) / weight.sum(0).unsqueeze(1)
    return found
