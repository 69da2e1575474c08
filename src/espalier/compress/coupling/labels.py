"""Labels of channels, and what must go together: a union of labels, with what is still undecided.

A tensor's channels carry labels: whole numbers in a tensor of the same shape (a "field"), spread
without copies along the dims that don't matter. 0 is a place that can never be cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Whole = NDArray[np.int64]


class Labels:
    """Labels joined into classes: channels of one class go together or not at all.

    `lock` says that labels can never be cut, and why. Rules that can't be decided before others
    have been met wait until `settle`.
    """

    def __init__(self) -> None:
        self._root: Whole = np.zeros(1, dtype=np.int64)
        self._why: Whole = np.zeros(1, dtype=np.int64)
        self.reasons: list[str] = ["padding or values of no channel"]
        self._waiting: list[tuple[int, Callable[[bool], bool]]] = []

    def new(self, n: int) -> Tensor:
        """n labels that were never used."""
        start = len(self._root)
        fresh = np.arange(start, start + n)
        self._root = np.concatenate([self._root, fresh])
        self._why = np.concatenate([self._why, np.full(n, -1)])
        return torch.from_numpy(fresh.copy())

    def find(self, labels: Tensor | Whole) -> Whole:
        """The class of each label, as its least label."""
        root: Whole = self._root[np.asarray(labels)]
        while True:
            above = self._root[root]
            if np.array_equal(above, root):
                return root
            root = above

    def join(self, a: Tensor, b: Tensor) -> None:
        """The labels at equal places go together."""
        a, b = thin(*torch.broadcast_tensors(a, b))  # type: ignore[no-untyped-call]
        one, two = a.numpy().ravel(), b.numpy().ravel()
        self.lock_labels(np.concatenate([one[two == 0], two[one == 0]]), "joined with padding")
        both = (one > 0) & (two > 0)
        one, two = one[both], two[both]
        while True:
            one, two = self.find(one), self.find(two)
            apart = one != two
            if not apart.any():
                return
            one, two = one[apart], two[apart]
            np.minimum.at(self._root, np.maximum(one, two), np.minimum(one, two))

    def lock(self, field: Tensor, why: str) -> None:
        """These channels are never cut."""
        self.lock_labels(thin(field)[0].numpy().ravel(), why)

    def lock_labels(self, labels: Whole, why: str) -> None:
        """`lock`, for an array of labels."""
        labels = np.unique(labels)
        free = labels[self._why[labels] == -1]
        if len(free):
            if why not in self.reasons:
                self.reasons.append(why)
            self._why[free] = self.reasons.index(why)

    def all_locked(self, field: Tensor) -> bool:
        """Whether every label of a field was locked itself."""
        return bool((self._why[thin(field)[0].numpy()] >= 0).all())

    def named(self, field: Tensor) -> set[int]:
        """The dims along which a field's labels differ."""
        return _differing(field, lambda labels: labels.numpy())

    def varying(self, field: Tensor) -> set[int]:
        """The dims along which a field's classes differ."""
        return _differing(field, self.find)

    def level(self, field: Tensor, dims: Iterable[int]) -> None:
        """Channels along these dims go together."""
        for dim in dims:
            self.join(field, field.narrow(dim, 0, 1))

    def same(self, f: Tensor, g: Tensor) -> None:
        """Two fields of one shape meet place by place."""
        if self.named(f) == self.named(g):
            self.join(f, g)
        elif not self._same(f, g):
            self._waiting.append((0, lambda force: self._same(f, g, force)))

    def _same(self, f: Tensor, g: Tensor, force: bool = False) -> bool:
        one, two = self.varying(f), self.varying(g)
        if one == two:
            self.join(f, g)
        elif not one & two:
            # each is cut along dims of its own: the other's must stay whole there
            self.fixed(f, self.named(g) & one, "joined with channels that are cut otherwise")
            self.fixed(g, self.named(f) & two, "joined with channels that are cut otherwise")
        elif not force:
            return False
        elif one < two or two < one:
            wide, extra = (f, one - two) if two < one else (g, two - one)
            self.level(wide, extra)
            self.join(f, g)
        else:
            self.lock(f, "joined with channels that are cut otherwise")
            self.lock(g, "joined with channels that are cut otherwise")
        return True

    def fixed(self, field: Tensor, dims: set[int], why: str) -> None:
        """Nothing may be cut along these dims."""
        if not self._fixed(field, dims, why):
            self._waiting.append((1, lambda force: self._fixed(field, dims, why, force)))

    def _fixed(self, field: Tensor, dims: set[int], why: str, force: bool = False) -> bool:
        varying = self.varying(field)
        if varying & dims and varying <= dims:
            self.lock(field, why)
        elif varying & dims:
            if not force:
                return False
            self.level(field, varying & dims)
        return True

    def grid(self, field: Tensor) -> None:
        """A field that must stay a box: it is cut along one dim only, by default the last."""
        if len(self.varying(field)) > 1:
            self._waiting.append((2, lambda force: self._grid(field, force)))

    def _grid(self, field: Tensor, force: bool = False) -> bool:
        varying = sorted(self.varying(field))
        if len(varying) < 2:
            return True
        if force:
            self.level(field, varying[:-1])
        return force

    def parts(self, field: Tensor, dim: int, sizes: set[int]) -> None:
        """A dim that is taken apart into parts of these sizes. Where they are even all parts lose
        alike, as a model does that computes the size of the parts from the whole."""
        self._waiting.append((3, lambda force: self._parts(field, dim, sizes, force)))

    def _parts(self, field: Tensor, dim: int, sizes: set[int], force: bool) -> bool:
        if not force:
            return False
        size = min(sizes)
        if len(sizes) == 1 and not field.shape[dim] % size:
            rows = self.find(field.movedim(dim, 0).reshape(field.shape[dim], -1)[:, 0]).reshape(
                -1, size
            )
            if len({tuple(sorted(part)) for part in rows.tolist()}) > 1:
                self.level(field.movedim(dim, 0).unflatten(0, rows.shape), {0})  # type: ignore[no-untyped-call]
        return True

    def settle(self) -> None:
        """Decide what waits: whatever follows from the rest first, then defaults one by one."""
        while self._waiting:
            left = [(rank, rule) for rank, rule in self._waiting if not rule(False)]
            if len(left) == len(self._waiting):
                first = min(range(len(left)), key=lambda i: left[i][0])
                left.pop(first)[1](True)
            self._waiting = left

    def classes(self) -> tuple[Whole, Whole]:
        """For every label its class and, where the class is locked, why (index; else -1)."""
        root = self.find(np.arange(len(self._root)))
        why = np.full(len(root), -1)
        locked = np.flatnonzero(self._why >= 0)[::-1]
        why[root[locked]] = self._why[locked]  # the earliest label's reason is written last
        return root, why[root]


def thin(*fields: Tensor) -> list[Tensor]:
    """The fields without dims along which none of them varies because it was only spread."""
    index = tuple(
        slice(0, 1) if all(f.stride(d) == 0 for f in fields) else slice(None)
        for d in range(fields[0].dim())
    )
    return [f[index] for f in fields]


def _differing(field: Tensor, values: Callable[[Tensor], Whole]) -> set[int]:
    found = np.asarray(values(thin(field)[0]))
    return {
        dim
        for dim in range(found.ndim)
        if found.shape[dim] > 1 and (found != found.take([0], axis=dim)).any()
    }
