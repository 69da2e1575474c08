"""Timings of several models in turns: ratios that hold on a machine that does not keep its pace.

What else runs on a machine slows it for seconds or minutes, and two timings taken one after the other
then say more of that than of the models. Within a round all models are timed one after another, in an
order drawn anew; a slow moment meets all of them, and the median over rounds passes over the rest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from espalier.costs.runtime import OnnxRuntime

_SECONDS = 0.1  # of one timing, at most: many short looks beat a long one
_LEAST, _MOST = 3, 9  # rounds
_SURE = 0.02  # half of the quartiles' distance that ends the rounds
_LONG = 6.0  # seconds after which the least rounds do
_OPENED = 0.1  # seconds of opening a model after which it stays open
_ORDER = 32  # purpose of the random stream


def interleaved(
    runtime: OnnxRuntime, models: Sequence[bytes], example: Tensor, rounds: int, seed: int = 0
) -> NDArray[np.float64]:
    """Milliseconds `(rounds, models)` of ONNX models on an example with the runtime's batch."""
    rng = np.random.default_rng([seed, _ORDER])
    timed = [_Timed(runtime, model, example) for model in models]
    return np.array([_round(timed, rng) for _ in range(rounds)])


@dataclass(frozen=True)
class Ratio:
    """A model's latency over another's: the median over rounds, and half the distance of the
    quartiles."""

    value: float
    spread: float
    rounds: int


def ratio(runtime: OnnxRuntime, model: bytes | Path, reference: bytes, example: Tensor) -> Ratio:
    """How long a model (bytes or path) takes, as a share of a reference timed beside it, in 3 to 9 rounds.

    `example` has the runtime's batch. Rounds end when the quartiles of the ratios agree within 2%,
    or after 6 seconds.
    """
    short = replace(runtime, seconds=min(runtime.seconds, _SECONDS))
    timed = [_Timed(short, each, example) for each in (model, reference)]
    rng, found = np.random.default_rng(_ORDER), list[float]()
    began = time.perf_counter()
    for _ in range(_MOST):
        mine, other = _round(timed, rng)
        found.append(mine / other)
        low, middle, high = np.quantile(found, (0.25, 0.5, 0.75))
        spread = float(high - low) / 2
        sure = spread <= _SURE * middle or time.perf_counter() - began > _LONG
        if len(found) >= _LEAST and sure:
            break
    return Ratio(float(middle), spread, len(found))


@dataclass
class _Timed:
    """One of the models. Each timing opens it anew, since where its tensors lie in memory is part of
    the noise; one that takes long to open stays open: of so large a model that is a small part."""

    runtime: OnnxRuntime
    model: bytes | Path
    example: Tensor
    kept: Callable[[], object] | None = field(default=None, init=False)

    def milliseconds(self) -> float:
        """One timing."""
        run, began = self.kept, time.perf_counter()
        if run is None:
            run = self.runtime.opened(self.model, self.example)
            if time.perf_counter() - began > _OPENED:
                self.kept = run
        return self.runtime.look(run).median_ms


def _round(timed: Sequence[_Timed], rng: np.random.Generator) -> list[float]:
    times = [0.0] * len(timed)
    for i in rng.permutation(len(timed)):
        times[i] = timed[i].milliseconds()
    return times
