"""Numbers that change while something learns: functions of progress, from 0 to 1.

Each is a small frozen object, so that it prints as what it is, and a checkpoint can compare it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from espalier.errors import EspalierError

Schedule = Callable[[float], float]


@dataclass(frozen=True)
class _Constant:
    value: float

    def __call__(self, progress: float) -> float:
        return self.value


@dataclass(frozen=True)
class _Linear:
    start: float
    end: float

    def __call__(self, progress: float) -> float:
        return self.start + (self.end - self.start) * progress


@dataclass(frozen=True)
class _Exponential:
    start: float
    rate: float
    epochs: float

    def __call__(self, progress: float) -> float:
        return float(self.start * self.rate ** (progress * self.epochs))


@dataclass(frozen=True)
class _CosinePower:
    high: float
    low: float
    order: float

    def __call__(self, progress: float) -> float:
        share = (1 + math.cos(math.pi * progress)) / 2
        if self.order != 1:
            # order^(share + 1), brought from order..order^2 to 0..1
            share = (self.order**share - 1) / (self.order - 1)
        return self.low + (self.high - self.low) * share


@dataclass(frozen=True)
class _After:
    share: float
    schedule: Schedule

    def __call__(self, progress: float) -> float:
        if progress < self.share:
            return 0.0
        return self.schedule((progress - self.share) / (1 - self.share))


def constant(value: float) -> Schedule:
    """The same number always."""
    return _Constant(float(value))


def linear(start: float, end: float) -> Schedule:
    """A straight line from `start` to `end`."""
    return _Linear(float(start), float(end))


def exponential(start: float, rate_per_epoch: float, epochs: float) -> Schedule:
    """`start`, multiplied by the rate in each of the epochs. Errors: `EspalierError`."""
    if rate_per_epoch <= 0 or epochs <= 0:
        raise EspalierError(
            "an exponential schedule needs a rate and epochs above 0, got "
            f"{rate_per_epoch!r} and {epochs!r}"
        )
    return _Exponential(float(start), float(rate_per_epoch), float(epochs))


def cosine(high: float, low: float = 0.0) -> Schedule:
    """Half a cosine from `high` to `low` (Loshchilov & Hutter, 2017, without restarts)."""
    return _CosinePower(float(high), float(low), 1.0)


def cosine_power(high: float, low: float, order: float) -> Schedule:
    """Cosine power annealing (sharpDARTS, Hundt et al., 2019): falls faster, the larger the order.

    Order 1 is the cosine. Errors: `EspalierError` for an order that is not above 0.
    """
    if order <= 0:
        raise EspalierError(f"the order of a cosine power must be above 0, got {order!r}")
    return _CosinePower(float(high), float(low), float(order))


def after(share: float, schedule: Schedule | float) -> Schedule:
    """0 for the first `share` of the way, then the whole schedule over the rest: a warm-up.

    Errors: `EspalierError` for a share outside 0..1, 1 excluded.
    """
    if not 0 <= share < 1:
        raise EspalierError(f"the share of a warm-up must be in 0..1, below 1, got {share!r}")
    return _After(float(share), scheduled(schedule))


def scheduled(value: Schedule | float) -> Schedule:
    """A schedule as it is, and a number as a constant one."""
    return value if callable(value) else constant(value)
