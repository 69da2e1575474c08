"""Stratified, seeded, disjoint splits of labelled examples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from espalier.errors import DataError

Indices = NDArray[np.int64]
_SHARE = 0.2  # validation and test, of a source without a test set of its own
_SHARE_BESIDE_TEST = 0.1  # validation, of the training part of a source that has one


@dataclass(frozen=True)
class Counts:
    """How many examples are asked of each split; None is the default share or all the rest."""

    train: int | None = None
    validation: int | None = None
    test: int | None = None


def split(
    labels: Indices, classes: int, test_from: int | None, counts: Counts, seed: int
) -> dict[str, Indices]:
    """Indices of train, validation and test, disjoint, each class in proportion, each shuffled.

    `labels` `(n,)` in 0..classes-1; examples from `test_from` on are the source's own test set
    (None: there is none and test is taken from all). Errors: `DataError` where a split can't hold
    every class or more is asked than there is.
    """
    rng = np.random.default_rng([seed, 0x5B117])
    end = len(labels) if test_from is None else test_from
    pool = rng.permutation(np.arange(end))
    share = _SHARE if test_from is None else _SHARE_BESIDE_TEST
    out: dict[str, Indices] = {}
    if test_from is None:
        out["test"], pool = _take("test", pool, labels, classes, counts.test, share, end)
    else:
        own = rng.permutation(np.arange(end, len(labels)))
        out["test"], _ = _take("test", own, labels, classes, counts.test, 1.0, len(own))
    validation = _take("validation", pool, labels, classes, counts.validation, share, end)
    out["validation"], pool = validation
    out["train"], _ = _take("train", pool, labels, classes, counts.train, 1.0, len(pool))
    return out


def _take(
    name: str,
    pool: Indices,
    labels: Indices,
    classes: int,
    count: int | None,
    share: float,
    total: int,
) -> tuple[Indices, Indices]:
    """Takes `count` (default `share` of `total`) from a shuffled pool: (taken, left)."""
    have = np.bincount(labels[pool], minlength=classes)
    wanted = max(round(share * total), classes) if count is None else count
    if (wanted < classes and share < 1.0) or (count is not None and count < classes):
        raise DataError(
            f"{name} must hold at least one example of each of the {classes} classes, "
            f"got {name}={wanted}"
        )
    if wanted > len(pool):
        raise DataError(
            f"{name}={wanted} is more than the {len(pool)} examples that are left for it: "
            "ask for fewer, here or in the other splits"
        )
    quota = _quota(have, wanted)
    # position of each example within its class, in pool order
    within = np.empty(len(pool), dtype=np.int64)
    for label in range(classes):
        mask = labels[pool] == label
        within[mask] = np.arange(mask.sum())
    chosen = within < quota[labels[pool]]
    return pool[chosen], pool[~chosen]


def _quota(have: Indices, wanted: int) -> Indices:
    """How many of each class make `wanted` in proportion, by largest remainder, at least one."""
    exact = have * (wanted / max(have.sum(), 1))
    quota: Indices = np.minimum(np.maximum(np.floor(exact).astype(np.int64), 1), have)
    # adding goes to the largest shortfall, removing to the largest surplus, first class first
    while quota.sum() != wanted:
        if quota.sum() < wanted:
            room = np.where(quota < have, exact - quota, -np.inf)
            quota[int(np.argmax(room))] += 1
        else:
            surplus = np.where(quota > 1, quota - exact, -np.inf)
            quota[int(np.argmax(surplus))] -= 1
    return quota
