"""Byte pairs: a vocabulary learned from text, and windows of text as tokens of any prefix of it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

BYTES = 256
_WALL = -1  # between windows; nothing is joined over it
Ids = NDArray[np.int64]


def learn(text: bytes, size: int) -> list[tuple[int, int]]:
    """The pairs to join, most frequent first, for a vocabulary of `size`: token 256 is the first
    pair, and so on (Sennrich, Haddow & Birch, 2016). Fewer where the text has no more pairs."""
    tokens = np.frombuffer(text, np.uint8).astype(np.int64)
    pairs: list[tuple[int, int]] = []
    while BYTES + len(pairs) < size:
        counts = np.bincount(tokens[:-1] * size + tokens[1:])
        most = int(counts.argmax()) if len(counts) else 0
        if not len(counts) or counts[most] < 2:
            break
        pairs.append((most // size, most % size))
        tokens = joined(tokens, pairs[-1], BYTES + len(pairs) - 1)
    return pairs


def joined(tokens: Ids, pair: tuple[int, int], name: int) -> Ids:
    """Tokens with each place where the pair stands joined into one, from the left."""
    at = np.flatnonzero((tokens[:-1] == pair[0]) & (tokens[1:] == pair[1]))
    if pair[0] == pair[1] and len(at):  # of a run of one token, every second place
        starts = np.flatnonzero(np.diff(at, prepend=at[0] - 2) != 1)
        place = np.arange(len(at)) - np.repeat(starts, np.diff(starts, append=len(at)))
        at = at[place % 2 == 0]
    out = tokens.copy()
    out[at] = name
    return np.delete(out, at + 1)


def encode(
    windows: NDArray[np.uint8], pairs: list[tuple[int, int]], sizes: Iterable[int], length: int
) -> dict[int, Ids]:
    """Windows `(n, bytes)` as `(n, length)` tokens for each size of the vocabulary.

    The first `length` tokens of each; where there are fewer, zeros follow. One pass over the pairs
    gives every size, because a smaller vocabulary is a prefix of a larger one.
    """
    walls = np.full((len(windows), 1), _WALL, dtype=np.int64)
    tokens = np.concatenate([windows.astype(np.int64), walls], axis=1).ravel()
    found = {}
    done = BYTES
    for size in sorted(set(sizes)):
        while done < min(size, BYTES + len(pairs)):
            tokens = joined(tokens, pairs[done - BYTES], done)
            done += 1
        found[size] = _rows(tokens, len(windows), length)
    return found


def _rows(tokens: Ids, count: int, length: int) -> Ids:
    walls = np.flatnonzero(tokens == _WALL)
    starts = np.concatenate([[0], walls[:-1] + 1])
    out = np.zeros((count, length), dtype=np.int64)
    at = starts[:, None] + np.arange(length)
    inside = at < walls[:, None]
    out[inside] = tokens[at[inside]]
    return out
