"""Ratios of latencies hold while the machine changes its pace."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from espalier.costs import OnnxRuntime
from espalier.costs.side_by_side import interleaved, ratio
from espalier.export import to_onnx

X = torch.zeros(1, 3, 8, 8)


@dataclass
class Drifting:
    """A runtime that becomes slower with every timing, and has hiccups."""

    seconds: float = 1.0
    drift: float = 1.02
    hiccup: int = 0
    timings: list[str] = field(default_factory=list)
    opens: list[str] = field(default_factory=list)

    def opened(self, model: bytes, example: torch.Tensor) -> str:
        self.opens.append(model.decode())
        return model.decode()

    def look(self, run: str) -> SimpleNamespace:
        self.timings.append(run)
        count = len(self.timings)
        slow = self.drift**count * (5.0 if self.hiccup and count % self.hiccup == 0 else 1.0)
        return SimpleNamespace(median_ms=slow * {"small": 0.3, "large": 0.5}[run])


def told(runtime: Drifting) -> tuple[float, int]:
    found = ratio(runtime, b"small", b"large", X)  # type: ignore[arg-type]
    return found.value, found.rounds


def test_a_drift_of_the_pace_is_not_read_as_a_difference() -> None:
    steady = told(Drifting(drift=1.0))
    assert steady == (pytest.approx(0.6), 3)
    value, _ = told(Drifting(drift=1.03))
    assert value == pytest.approx(0.6, rel=0.04)
    one_after_the_other = 0.3 * 1.03 / (0.5 * 1.03**10)
    assert one_after_the_other < 0.5


def test_hiccups_are_outvoted_and_take_more_rounds() -> None:
    value, rounds = told(Drifting(drift=1.0, hiccup=5))
    assert value == pytest.approx(0.6)
    assert 3 < rounds <= 9


def test_slow_models_have_the_least_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("espalier.costs.side_by_side._LONG", 0.0)
    assert told(Drifting(drift=1.0, hiccup=5))[1] == 3


def test_what_takes_long_to_open_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("espalier.costs.side_by_side._OPENED", float("inf"))
    runtime = Drifting(drift=1.0)
    assert told(runtime) == (pytest.approx(0.6), 3)
    assert sorted(runtime.opens) == ["large"] * 3 + ["small"] * 3
    monkeypatch.setattr("espalier.costs.side_by_side._OPENED", -1.0)
    runtime = Drifting(drift=1.0)
    assert told(runtime) == (pytest.approx(0.6), 3)
    assert sorted(runtime.opens) == ["large", "small"]


def test_every_round_times_every_model_in_an_order_of_its_own() -> None:
    runtime = Drifting(drift=1.0)
    found = interleaved(runtime, (b"small", b"large"), X, rounds=8, seed=1)  # type: ignore[arg-type]
    assert found == pytest.approx(np.tile([0.3, 0.5], (8, 1)))
    rounds = [tuple(runtime.timings[i : i + 2]) for i in range(0, 16, 2)]
    assert set(rounds) == {("small", "large"), ("large", "small")}


def test_of_a_real_runtime_the_larger_network_takes_longer() -> None:
    models = [
        to_onnx(nn.Conv2d(3, width, 3, padding=1), X.repeat(1, 1, 8, 8), fast=True)
        for width in (4, 64)
    ]
    runtime = OnnxRuntime(seconds=0.02)
    found = ratio(runtime, *models, runtime.batched(X.repeat(1, 1, 8, 8)))
    assert 0 < found.value < 1
