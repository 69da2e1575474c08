"""How a guided search chooses among candidates it has not tried: scores from what is believed.

All values here are to be maximised. A slot is a frozen dataclass with its numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from espalier.errors import EspalierError
from espalier.estimators.predictors.regressor import Belief
from espalier.problem import front

Array = NDArray[np.float64]

_SLOPE = 0.05
_DRAWS = 32


class Acquisition(ABC):
    """Scores candidates."""

    @abstractmethod
    def __call__(self, beliefs: Sequence[Belief], best: Array, rng: np.random.Generator) -> Array:
        """Scores `(n,)`, the highest is tried first.

        `beliefs` holds one an objective; `best` `(k, m)` are the values of rows that keep every
        limit, k at least 1.
        """


@dataclass(frozen=True)
class Expected(Acquisition):
    """Expected improvement (Jones, Schonlau & Welch, 1998).

    With two objectives it is that of the hypervolume, exact for independent normal beliefs (Emmerich,
    Deutz & Klinkenberg, 2011), beyond the worst of `best`; with more, that of a random weighting of
    the objectives by 32 draws (ParEGO; Knowles, 2006).
    """

    def __call__(self, beliefs: Sequence[Belief], best: Array, rng: np.random.Generator) -> Array:
        """The expected gain `(n,)`."""
        if len(beliefs) == 1:
            return _gain(beliefs[0].mean, beliefs[0].std, float(best.max()))
        if len(beliefs) == 2:
            return _volume_gain(beliefs, best)
        weights = rng.dirichlet(np.ones(len(beliefs)))
        mean, std = _stacked(beliefs)
        noise = rng.standard_normal((_DRAWS, 1, len(beliefs)))
        drawn = _scalar(mean + std * noise, weights)
        gains: Array = np.maximum(drawn - _scalar(best, weights).max(), 0.0).mean(axis=0)
        return gains


@dataclass(frozen=True)
class Thompson(Acquisition):
    """One draw from the belief about each candidate on its own: independent Thompson sampling, as
    in BANANAS (White et al., 2021). Several objectives are weighted at random, anew each time."""

    def __call__(self, beliefs: Sequence[Belief], best: Array, rng: np.random.Generator) -> Array:
        """The draws `(n,)`."""
        mean, std = _stacked(beliefs)
        drawn = mean + std * rng.standard_normal(mean.shape)
        return _scalar(drawn, rng.dirichlet(np.ones(len(beliefs))))


@dataclass(frozen=True)
class UCB(Acquisition):
    """Upper confidence bound: mean + `beta` deviations (Srinivas et al., 2010); `beta=0` takes the
    predicted best, as NPENAS does (Wei et al., 2020). Several objectives are weighted at random."""

    beta: float = 1.0

    def __call__(self, beliefs: Sequence[Belief], best: Array, rng: np.random.Generator) -> Array:
        """The bounds `(n,)`."""
        mean, std = _stacked(beliefs)
        return _scalar(mean + self.beta * std, rng.dirichlet(np.ones(len(beliefs))))


ACQUISITIONS: dict[str, Acquisition] = {
    "expected": Expected(),
    "thompson": Thompson(),
    "ucb": UCB(),
}


def optimism(beliefs: Sequence[Belief], best: Array, rng: np.random.Generator) -> Array:
    """A generous score `(n,)`, to choose which candidates are looked at again and again."""
    if len(beliefs) == 1:
        return beliefs[0].mean + 2 * beliefs[0].std
    return Expected()([Belief(b.mean, 2 * b.std) for b in beliefs], best, rng)


def kept_probability(belief: Belief) -> Array:
    """How probably a row keeps every limit, where the belief is about how far it is on the right
    side."""
    return np.asarray(ndtr(belief.mean / np.maximum(belief.std, 1e-9)))


def _stacked(beliefs: Sequence[Belief]) -> tuple[Array, Array]:
    return np.stack([b.mean for b in beliefs], axis=1), np.stack([b.std for b in beliefs], axis=1)


def _scalar(values: Array, weights: Array) -> Array:
    """Weighted values `(..., m)` to one: the worst, and 5% of their sum (augmented Tchebycheff)."""
    weighted = values * weights
    return np.asarray(weighted.min(axis=-1) + _SLOPE * weighted.sum(axis=-1))


def _gain(mean: Array, std: Array, best: float | Array) -> Array:
    """E[max(value - best, 0)] of normal values."""
    std = np.maximum(std, 1e-12)
    u = (mean - best) / std
    density = np.exp(-0.5 * u * u) / np.sqrt(2 * np.pi)
    return np.asarray(np.maximum(std * (u * ndtr(u) + density), 0.0))


def _volume_gain(beliefs: Sequence[Belief], best: Array) -> Array:
    """E[hypervolume added] of two independent normal values, by strips between front points."""
    if best.shape[1] != 2:
        raise EspalierError(f"two beliefs need two values a row, got {best.shape[1]}")
    reference = best.min(axis=0) - 0.1 * np.ptp(best, axis=0)
    points = best[front(-best)]
    points = points[np.argsort(points[:, 0])]  # first value rises, second falls
    lefts = np.concatenate([[reference[0]], points[:, 0]])
    floors = np.concatenate([points[:, 1], [reference[1]]])
    first, second = beliefs
    total = np.zeros(len(first.mean))
    above = _gain(first.mean, first.std, float(lefts[0]))
    for k, floor in enumerate(floors):
        right = lefts[k + 1] if k + 1 < len(lefts) else np.inf
        beyond = (
            _gain(first.mean, first.std, float(right)) if right < np.inf else np.zeros(len(total))
        )
        total += (above - beyond) * _gain(second.mean, second.std, float(floor))
        above = beyond
    return total
