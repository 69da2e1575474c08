"""Random streams of a training, each a function of the seed, the epoch and its purpose."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def mixed(*parts: int) -> int:
    """One seed (63 bits) out of several numbers, none below 0."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(*parts: int) -> torch.Generator:
    """A generator seeded by several numbers."""
    return torch.Generator().manual_seed(mixed(*parts))


@contextmanager
def global_seed(*parts: int) -> Iterator[None]:
    """Seeds torch's global generator (dropout, initial weights) and puts it back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mixed(*parts))
        yield
