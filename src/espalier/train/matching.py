"""Gradient matching: which options of which decision want different shared weights.

Hu et al., "Generalizing Few-Shot NAS with Gradient Matching", 2022
(https://arxiv.org/abs/2203.15207): two options of a decision may share weights where they pull them
the same way. How far they do not is the distance between the gradients of what they share; the
decision that has most of it is where a supernet is best divided.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from espalier.errors import SpaceError
from espalier.space import Candidate, Option, Real, Space
from espalier.tasks import Task
from espalier.train.running import device_of, laid_out
from espalier.train.seeds import generator

_CONTEXTS, _RANDOM = 4, 5  # purposes of random streams
_MOST = 16  # options of a decision whose divisions are all looked at

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Split:
    """One decision's options in two groups, and the distances `(options, options)` that said so."""

    decision: str
    groups: tuple[tuple[Option, ...], tuple[Option, ...]]
    distances: Mapping[str, list[list[float]]] = field(default_factory=dict)  # of every decision

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        groups = [list(group) for group in self.groups]
        return {"decision": self.decision, "groups": groups, "distances": dict(self.distances)}


def distances(
    supernet: Any, task: Task, batches: int = 16, batch: int = 64, seed: int = 0
) -> dict[str, Array]:
    """For each decision, how far its options' gradients of what they share are from each other.

    The rest of the candidate is drawn, anew for each batch, and is the same for all options. Gives
    `(options, options)` arrays of the mean over filters of 1 - cosine, 0 on the diagonal: 0 where
    two options pull shared weights the same way. Real decisions have none. The supernet stays as it
    is; the cost is that of `batches` steps for every option of every decision.
    """
    space: Space = supernet.space
    found = islice(task.batches("train", batch, generator(seed, _CONTEXTS)), batches)
    device = device_of(supernet)
    data = [(laid_out(supernet, x.to(device)), y.to(device)) for x, y in found]
    contexts = space.sample(len(data), np.random.default_rng([seed, _CONTEXTS]))
    out: dict[str, Array] = {}
    with _as_it_was(supernet):
        for column, decision in enumerate(space.decisions):
            if isinstance(decision, Real) or decision.count < 2:
                continue
            pulls = [
                _pull(supernet, task, _with(space, contexts, column, code), data)
                for code in range(decision.count)
            ]
            out[decision.name] = np.array([[_distance(a, b) for b in pulls] for a in pulls])
    return out


def _with(space: Space, contexts: NDArray[Any], column: int, code: int) -> list[Candidate]:
    """The contexts with one decision set; those where it is not active stay as they are."""
    codes = contexts.copy()
    codes[space.active(codes)[:, column], column] = code
    return space.decode(space.canonical(codes))


def _pull(
    supernet: Any,
    task: Task,
    candidates: Sequence[Candidate],
    data: Sequence[tuple[Tensor, Tensor]],
) -> dict[str, Tensor]:
    """The gradient of every weight that was used, as rows of filters, summed over the batches."""
    named = {n: p for n, p in supernet.named_parameters() if p.requires_grad and p.ndim > 1}
    total: dict[str, Tensor] = {}
    for candidate, (x, y) in zip(candidates, data, strict=True):
        supernet.activate(candidate)
        loss = task.loss(supernet(x), y)
        gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        for name, gradient in zip(named, gradients, strict=True):
            if gradient is not None:
                rows = gradient.flatten(1)
                total[name] = rows if name not in total else total[name] + rows
    return total


def _distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Mean over the filters that both reach of 1 - cosine; 0 where they share nothing."""
    if a is b:
        return 0.0
    total, count = 0.0, 0
    for name in (n for n in a if n in b):
        sizes = a[name].norm(dim=1) * b[name].norm(dim=1)
        reached = sizes > 0
        products = (a[name] * b[name]).sum(1)[reached]
        total += float((1 - products / sizes[reached]).sum())
        count += int(reached.sum())
    return total / max(count, 1)


def best_split(space: Space, found: Mapping[str, Array]) -> Split:
    """The decision and its two groups with the most distance between them.

    In each decision the groups are those with the least distance within, of all divisions in two.
    """
    cuts = {name: _cut(far) for name, far in found.items()}
    name = max(cuts, key=lambda n: cuts[n][0])
    options = space[name].options
    second = cuts[name][1]
    groups = (
        tuple(o for i, o in enumerate(options) if i not in second),
        tuple(o for i, o in enumerate(options) if i in second),
    )
    return Split(name, groups, {n: far.tolist() for n, far in found.items()})


def _cut(far: Array) -> tuple[float, set[int]]:
    """The distance between the best two groups, and the indices of the one without option 0."""
    count = len(far)
    if count > _MOST:
        raise SpaceError(f"a decision to split has at most {_MOST} options, got {count}")
    best: tuple[float, set[int]] = (-1.0, set())
    for mask in range(1, 2 ** (count - 1)):
        second = {i for i in range(1, count) if mask >> (i - 1) & 1}
        first = [i for i in range(count) if i not in second]
        between = float(far[np.ix_(first, sorted(second))].sum())
        if between > best[0]:  # the most between is the least within: together they are constant
            best = between, second
    return best


def random_split(space: Space, seed: int) -> Split:
    """Any decision, its options in any two groups of equal sizes (or one more in the first)."""
    rng = np.random.default_rng([seed, _RANDOM])
    able = [d for d in space.decisions if not isinstance(d, Real) and d.count > 1]
    decision = able[int(rng.integers(len(able)))]
    second = set(rng.permutation(decision.count)[: decision.count // 2].tolist())
    options = decision.options
    groups = (
        tuple(o for i, o in enumerate(options) if i not in second),
        tuple(o for i, o in enumerate(options) if i in second),
    )
    return Split(decision.name, groups)


@contextmanager
def _as_it_was(supernet: Any) -> Iterator[None]:
    """Runs a supernet in training mode; buffers, mode and active candidate are put back."""
    before = [(b, b.clone()) for b in supernet.buffers()]
    modes = [(m, m.training) for m in supernet.modules()]
    active = getattr(supernet, "active", None)
    supernet.train()
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
        for module, training in modes:
            module.training = training
        if active is not None:
            supernet.activate(active)
