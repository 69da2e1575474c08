"""Evolution of which experts stay and how they are merged, on a loss read by inference alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from espalier.compress.language.anatomy import Experts, anatomy
from espalier.compress.language.experts.merging import STACKS, merge_experts
from espalier.compress.language.experts.refit import refit_in_turn
from espalier.compress.language.shape.surgery import set_active

Rng = np.random.Generator


@dataclass(frozen=True, eq=False)
class Genome:
    """Of every layer with experts the two matrices `(layers, kept, count)`: how new experts are mixed
    from the old, and the router's logits from the old logits."""

    mix: Tensor
    router: Tensor

    @classmethod
    def keeping(cls, experts: Tensor, count: int) -> Genome:
        """Experts `(layers, kept)` as they are."""
        rows = one_hot(experts.long(), count).double()
        return cls(rows, rows)

    @property
    def kept(self) -> Tensor:
        """The expert with the largest share in each new one `(layers, kept)`."""
        return self.mix.argmax(-1)


class Mixtures:
    """A model whose experts are mixed anew for each genome; it counts how often it is asked.

    `windows (n, t)`: what the loss is read on. `active`: experts a token gets, or as the model has.
    """

    def __init__(self, model: Any, kept: int, windows: Tensor, active: int | None = None) -> None:
        found = [(i, layer.feed) for i, layer in enumerate(anatomy(model).layers)]
        self.layers = [(i, feed) for i, feed in found if isinstance(feed, Experts)]
        self.count, self.kept, self.windows, self.calls = self.layers[0][1].count, kept, windows, 0
        self.source, self.active = model, active
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.old = [[p.detach().clone() for p in self._own(feed)] for _, feed in self.layers]
        first = torch.eye(self.count)[:kept]
        for number, _ in self.layers:
            merge_experts(self.model, number, first, first)
            if active is not None:
                set_active(self.model, number, active)

    def _own(self, feed: Experts) -> list[Any]:
        experts = self.model.get_submodule(f"{feed.path}.experts")
        gate: Any = self.model.get_submodule(feed.router)
        return [*(getattr(experts, name) for name in STACKS), gate.weight]

    def put(self, genome: Genome) -> None:
        """Gives the model the experts of a genome."""
        with torch.inference_mode():
            for at, (_, feed) in enumerate(self.layers):
                matrices = (genome.mix[at], genome.mix[at], genome.router[at])
                for new, old, m in zip(self._own(feed), self.old[at], matrices, strict=True):
                    new.copy_(torch.tensordot(m.to(old), old, dims=1))

    def refitted(self, genome: Genome, windows: Tensor) -> Any:
        """A model with the experts of a genome, their last maps fitted to what the layers gave."""
        model = copy.deepcopy(self.source)
        changes = {
            number: partial(merge_experts, model, number, genome.mix[at], genome.router[at])
            for at, (number, _) in enumerate(self.layers)
        }
        refit_in_turn(model, windows, changes, damp=0.01)
        if self.active is not None:
            for number in changes:
                set_active(model, number, self.active)
        return model

    def score(self, genome: Genome, windows: Tensor | None = None) -> float:
        """Minus 100 times the loss in nats a token: a point is a hundredth of a nat."""
        self.put(genome)
        self.calls += 1
        return -100 * loss(self.model, self.windows if windows is None else windows)


@torch.inference_mode()
def loss(model: Any, windows: Tensor, batch: int = 16) -> float:
    """Of the next token, in nats, over windows `(n, t)`."""
    total = 0.0
    for rows in torch.split(windows, batch):
        logits = model(rows, use_cache=False).logits[:, :-1].flatten(0, 1)
        total += float(cross_entropy(logits, rows[:, 1:].flatten())) * len(rows)
    return total / len(windows)


@dataclass(frozen=True)
class Settings:
    """The published numbers; margins in the points of the score."""

    starts: int = 30
    prune_margin: float = 3.0
    merge_margin: float = 1.0
    layer: float = 0.25
    row: float = 0.15
    crossover: float = 0.3
    front: float = 0.6
    entry: float = 0.25
    spread: float = 0.065
    normalise: float = 0.1


class Evolution:
    """Two phases, each for so many evaluations: `prune` chooses experts, `merge` mixes them."""

    def __init__(
        self,
        score: Callable[[Genome], float],
        layers: int,
        count: int,
        kept: int,
        rng: Rng,
        settings: Settings = Settings(),
    ) -> None:
        self.score, self.layers, self.count, self.kept = score, layers, count, kept
        self.rng, self.settings = rng, settings
        self.seen: list[tuple[float, Genome]] = []
        self._known: set[tuple[int, ...]] = set()

    @property
    def best(self) -> tuple[float, Genome]:
        """The best so far, the first of equals."""
        return max(self.seen, key=lambda one: one[0])

    def top(self, n: int) -> list[Genome]:
        """The n best."""
        order = sorted(range(len(self.seen)), key=lambda i: -self.seen[i][0])
        return [self.seen[i][1] for i in order[:n]]

    def _tell(self, genome: Genome) -> None:
        self.seen.append((self.score(genome), genome))

    def _parent(self, margin: float) -> Genome:
        least = self.best[0] - margin
        near = [genome for value, genome in self.seen if value >= least]
        return near[int(self.rng.integers(len(near)))]

    def begin(self, genomes: Sequence[Genome]) -> None:
        """Starts from choices made otherwise, one evaluation each, and none at random."""
        self.settings = replace(self.settings, starts=0)
        for genome in genomes:
            self._known.add(_key(genome))
            self._tell(genome)

    def random(self) -> Genome:
        """Any experts of each layer."""
        rows = [self.rng.choice(self.count, self.kept, replace=False) for _ in range(self.layers)]
        return Genome.keeping(torch.tensor(np.array(rows)), self.count)

    def prune(self, evaluations: int, only_random: bool = False) -> None:
        """Random choices first, then mutants of those near the best; no choice is tried twice."""
        for _ in range(evaluations):
            fresh = only_random or len(self.seen) < self.settings.starts
            for _ in range(1000):
                child = self.random() if fresh else self._swapped()
                if _key(child) not in self._known:
                    break
            self._known.add(_key(child))
            self._tell(child)

    def _swapped(self) -> Genome:
        """Some experts of some layers replaced by others that the layer does not have."""
        s, rng = self.settings, self.rng
        kept = self._parent(s.prune_margin).kept.numpy().copy()
        for layer in np.nonzero(rng.random(self.layers) < s.layer)[0]:
            for row in np.nonzero(rng.random(self.kept) < s.row)[0]:
                others = np.setdiff1d(np.arange(self.count), kept[layer])
                if len(others):
                    kept[layer, row] = rng.choice(others)
        return Genome.keeping(torch.from_numpy(kept), self.count)

    def merge(self, evaluations: int) -> None:
        """Rows of two parents, or noise on the matrices of one."""
        for _ in range(evaluations):
            crossed = self.rng.random() < self.settings.crossover
            self._tell(self._crossed() if crossed else self._noisy())

    def _crossed(self) -> Genome:
        """Each row of the best with some probability, otherwise of one that is near it."""
        front, other = self.best[1], self._parent(self.settings.merge_margin)
        draws = self.rng.random((self.layers, self.kept, 1)) < self.settings.front
        own = torch.from_numpy(draws)
        return Genome(
            torch.where(own, front.mix, other.mix), torch.where(own, front.router, other.router)
        )

    def _noisy(self) -> Genome:
        parent = self._parent(self.settings.merge_margin)
        return Genome(self._moved(parent.mix), self._moved(parent.router))

    def _moved(self, matrix: Tensor) -> Tensor:
        s, rng, shape = self.settings, self.rng, tuple(matrix.shape)
        noise = rng.standard_normal(shape) * s.spread * (rng.random(shape) < s.entry)
        moved = matrix.numpy() + noise
        whole = moved.sum(-1, keepdims=True)
        again = (rng.random((*shape[:-1], 1)) < s.normalise) & (np.abs(whole) > 0.1)
        return torch.from_numpy(np.where(again, moved / np.where(again, whole, 1), moved))


def _key(genome: Genome) -> tuple[int, ...]:
    return tuple(genome.kept.sort(-1).values.flatten().tolist())


def ordered(scores: Sequence[Tensor], kept: int) -> Genome:
    """The experts with the largest score of each layer."""
    rows = [s.argsort(descending=True, stable=True)[:kept].sort().values for s in scores]
    return Genome.keeping(torch.stack(rows), len(scores[0]))


def bits(nats: float) -> float:
    """Bits a byte where tokens are bytes."""
    return nats / math.log(2)
