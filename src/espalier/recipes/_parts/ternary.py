"""Weights of three values and their code: pairs of values in words of 16 bits, decoded by a table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from espalier.compress.language.weights.rounding import column_by_column
from espalier.errors import EspalierError

Array = NDArray[Any]
LONGEST = 28  # values in a word: 14 pairs
_SMALL = 1e-4  # probability of a value that is never seen


@dataclass(frozen=True)
class Ternary:
    """`signs (..., o, d)` int8 of -1, 0, 1, and what -1 and 1 stand for in each row, `(..., o)`."""

    signs: Tensor
    low: Tensor
    high: Tensor

    def values(self) -> Tensor:
        """The weights, float32."""
        low, high = self.low[..., None], self.high[..., None]
        return torch.where(self.signs > 0, high, torch.where(self.signs < 0, low, 0.0)).float()


def ternary(weight: Tensor, gram: Tensor | None, rows: int = 1, damp: float = 0.1) -> Ternary:
    """Weights `(..., o, d)` on {least, 0, largest} of their row, or of the `rows` rows that share
    these: nearest without a Gram matrix, otherwise column by column, all matrices at once, errors
    compensated. Errors: `EspalierError` where o is no multiple of `rows`."""
    if weight.shape[-2] % rows:
        raise EspalierError(f"{weight.shape[-2]} rows are not whole groups of {rows}")
    w = weight.double()
    groups = w.reshape(*w.shape[:-2], -1, rows * w.shape[-1])
    low = groups.amin(-1).clamp_max(0).repeat_interleave(rows, -1)
    high = groups.amax(-1).clamp_min(0).repeat_interleave(rows, -1)

    def level(now: Tensor, _: Tensor) -> Tensor:
        zero = torch.zeros_like(now)
        return torch.where(now > high / 2, high, torch.where(now < low / 2, low, zero))

    if gram is None:
        found = torch.stack([level(column, column) for column in w.unbind(-1)], -1)
    else:
        found = column_by_column(w, gram.double(), level, torch.zeros_like(w), damp=damp)
    return Ternary(found.sign().to(torch.int8), low.float(), high.float())


def entropy(signs: Array) -> float:
    """Bits a value that no code of single values can be below."""
    share = np.bincount(signs.ravel().astype(np.int64) + 1, minlength=3) / signs.size
    return float(-sum(p * math.log2(p) for p in share if p > 0))


@dataclass(frozen=True)
class Words:
    """The most probable sequences of pairs: `values (words, 28)` int8, `length (words,)` of them, and
    `follow (words, 9)`, the word that is one pair longer, -1 where there is none; word 0 is empty.

    As a word's beginning is always more probable than the word, every beginning is a word too.
    """

    values: Array
    length: Array
    follow: Array

    @classmethod
    def of(cls, zeros: float, bits: int = 16) -> Words:
        """The 2 ** bits - 1 most probable ones where a value is 0 with probability `zeros` and
        otherwise -1 or 1, each alike. Errors: `EspalierError` where not even every pair has one."""
        zero = math.log(min(max(zeros, _SMALL), 1 - _SMALL))
        other = math.log((1 - min(max(zeros, _SMALL), 1 - _SMALL)) / 2)
        least, spare = _threshold(zero, other, 2**bits - 1)
        pairs = np.array([(a, b) for a in (0, 1, -1) for b in (0, 1, -1)], dtype=np.int8)
        chance = np.where(pairs == 0, zero, other).sum(1)
        values = [np.zeros((1, LONGEST), dtype=np.int8)]
        length, chances = [np.zeros(1, dtype=np.int64)], np.zeros(1)
        follow, total, last = [], 1, np.zeros(1, dtype=np.int64)
        for at in range(0, LONGEST, 2):
            grown = chances[:, None] + chance
            above, tie = grown > least + 1e-9, np.abs(grown - least) <= 1e-9
            tie &= tie.cumsum().reshape(tie.shape) <= spare
            spare -= int(tie.sum())
            keep = above | tie
            numbers = np.full(keep.shape, -1, dtype=np.int64)
            numbers[keep] = total + np.arange(keep.sum())
            follow.append(numbers)
            parent, pair = np.nonzero(keep)
            new = values[-1][parent].copy()
            new[:, at : at + 2] = pairs[pair]
            values.append(new)
            length.append(np.full(len(new), at + 2))
            chances, last = grown[keep], numbers[keep]
            total += len(new)
        follow.append(np.full((len(last), 9), -1))
        if (follow[0] < 0).any():
            raise EspalierError(
                f"{2**bits} words are too few: some pairs have none; take more bits"
            )
        return cls(np.concatenate(values), np.concatenate(length), np.concatenate(follow))


def _threshold(zero: float, other: float, count: int) -> tuple[float, int]:
    """The log-probability of the last words that fit, and how many of these do."""
    sizes: list[tuple[float, int]] = []
    for size in range(2, LONGEST + 1, 2):
        for k in range(size + 1):
            sizes.append(((size - k) * zero + k * other, math.comb(size, k) * 2**k))
    for chance, number in sorted(sizes, reverse=True):
        if number >= count:
            return chance, count
        count -= number
    return -math.inf, 0


@dataclass(frozen=True)
class Coded:
    """Rows of ternary values `(rows, d)` as words of 16 bits, each row by itself: `starts (rows + 1,)`
    says where its words are."""

    words: Array
    starts: Array
    shape: tuple[int, int]

    @property
    def bits(self) -> float:
        """Bits a value, words alone."""
        return 16 * len(self.words) / math.prod(self.shape)

    @property
    def bits_with_starts(self) -> float:
        """Bits a value, with 16 bits a row for how many words it has."""
        return 16 * (len(self.words) + self.shape[0]) / math.prod(self.shape)


def encode(signs: Array, words: Words) -> Coded:
    """The longest word that fits, from the left, all rows `(rows, d)` at once; what a row's last word
    says beyond its end is zeros."""
    rows, d = signs.shape
    padded = np.pad(signs, ((0, 0), (0, LONGEST + d % 2)))
    place = np.where(padded < 0, 2, padded).astype(np.int64)  # as pairs are numbered: 0, 1, -1
    pairs = place[:, 0:-1:2] * 3 + place[:, 1::2]
    at = np.zeros(rows, dtype=np.int64)
    active = np.arange(rows)
    found: list[Array] = []
    owners: list[Array] = []
    while len(active):
        word = np.zeros(len(active), dtype=np.int64)
        for step in range(LONGEST // 2):
            longer = words.follow[
                word, pairs[active, np.minimum(at[active] + step, d // 2 + LONGEST // 2 - 1)]
            ]
            word = np.where((longer >= 0) & (words.length[word] == 2 * step), longer, word)
        found.append(word)
        owners.append(active)
        at[active] += words.length[word] // 2
        active = active[2 * at[active] < d]
    owner, word = np.concatenate(owners), np.concatenate(found)
    counts = np.bincount(owner, minlength=rows)
    order = owner.argsort(kind="stable")
    starts = np.concatenate([[0], counts.cumsum()])
    return Coded(word[order].astype(np.uint16), starts, (rows, d))


def decode(coded: Coded, words: Words, rows: slice = slice(None)) -> Array:
    """The values of some rows `(rows, d)` int8: a look-up a word, then what is beyond a row's end is
    left out."""
    first, last, _ = rows.indices(coded.shape[0])
    starts, d = coded.starts, coded.shape[1]
    own = coded.words[starts[first] : starts[last]].astype(np.int64)
    length = words.length[own]
    row = np.repeat(np.arange(first, last), np.diff(starts[first : last + 1])) - first
    before = np.concatenate([[0], length.cumsum()])[:-1]
    begin = before[starts[first:last] - starts[first]]
    column = (before - begin[row])[:, None] + np.arange(LONGEST)
    inside = (np.arange(LONGEST) < length[:, None]) & (column < d)
    found = np.zeros((last - first, d), dtype=np.int8)
    found[np.broadcast_to(row[:, None], column.shape)[inside], column[inside]] = words.values[own][
        inside
    ]
    return found


def product(
    coded: Coded, words: Words, low: Array, high: Array, x: Array, block: int = 64
) -> Array:
    """`x (n, d)` times the matrix transposed `(n, rows)`: `block` rows at a time are decoded and
    multiplied, so that the whole matrix is never there."""
    made = np.empty((len(x), coded.shape[0]), dtype=x.dtype)
    for start in range(0, coded.shape[0], block):
        part = slice(start, min(start + block, coded.shape[0]))
        signs = decode(coded, words, part)
        up, down = x @ (signs > 0).T.astype(x.dtype), x @ (signs < 0).T.astype(x.dtype)
        made[:, part] = up * high[part] + down * low[part]
    return made
