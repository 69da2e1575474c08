"""How numbers read in a report: units, rounding, dashes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from espalier.report import numbers
from espalier.report.numbers import DASH


@pytest.mark.parametrize(
    ("value", "metric", "unit", "text"),
    [
        (0.2834, "latency_ms", "ms", "0.283 ms"),
        (0.00583, "latency_ms", "ms", "5.83 µs"),
        (0.0583, "latency_ms", "ms", "0.0583 ms"),
        (0.1, "latency_ms", "", "0.1 ms"),
        (12.34, "latency_ms", "ms", "12.3 ms"),
        (1530, "latency_ms", "ms", "1.53 s"),
        (41_234, "params", "", "41.2k"),
        (60_000, "params", "", "60k"),
        (999, "params", "", "999"),
        (999_900, "params", "", "1M"),
        (1_930_000, "macs", "", "1.93M"),
        (2.5e9, "macs", "", "2.5G"),
        (0, "macs", "", "0"),
        (225_000, "bytes", "B", "225 KB"),
        (1_600_000, "activation_bytes", "B", "1.6 MB"),
        (12, "bytes", "", "12 B"),
        (0.981, "accuracy", "", "98.1%"),
        (0.5, "recall", "share", "50.0%"),
        (0.12345, "loss", "nats", "0.123 nats"),
        (3.21, "energy", "mJ", "3.21 mJ"),
        (95, "elapsed", "s", "1 min 35 s"),
        (np.float64(0.25), "latency_ms", "ms", "0.25 ms"),
    ],
)
def test_units(value: float, metric: str, unit: str, text: str) -> None:
    assert numbers.show(value, metric, unit) == text


@pytest.mark.parametrize("nothing", [None, math.nan, math.inf, -math.inf, "12", True, [1], np.nan])
def test_what_is_no_number_is_a_dash(nothing: object) -> None:
    shown = [
        numbers.show(nothing, "latency_ms", "ms"),
        numbers.share(nothing),
        numbers.points(nothing),
        numbers.change(nothing, "params"),
        numbers.duration(nothing),
    ]
    assert shown == [DASH] * 5


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.41, "0.41 s"), (9.14, "9.1 s"), (59.6, "1 min"), (61, "1 min 1 s"), (3600, "1 h"),
     (7500, "2 h 5 min")],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert numbers.duration(seconds) == text


def test_a_value_and_its_limit_share_a_unit_and_never_look_equal_when_they_differ() -> None:
    assert numbers.against(0.095, 0.11, "latency_ms", "ms") == ("0.095 ms", "0.11 ms")
    assert numbers.against(900, 60_000, "params") == ("0.9k", "60k")
    assert numbers.against(0.30004, 0.3, "latency_ms", "ms") == ("0.30004 ms", "0.3 ms")
    assert numbers.against(0.3, 0.3, "latency_ms", "ms") == ("0.3 ms", "0.3 ms")
    assert numbers.against(None, 0.3, "latency_ms", "ms") == (DASH, "0.3 ms")


def test_changes_carry_a_sign_and_one_last_digit() -> None:
    assert numbers.change(-0.0121, "accuracy") == "−1.2 points"
    assert numbers.change(0.00001, "accuracy") == "±0.0 points"
    largest = 0.0078
    shown = [numbers.change(v, "latency_ms", "ms", like=largest) for v in (-0.0078, 5.6e-4, 1e-5)]
    assert shown == ["−7.8 µs", "+0.6 µs", "±0 µs"]


def test_whole_numbers_group_and_grow() -> None:
    assert numbers.whole(8_748_000.0) == "8,748,000"
    assert numbers.whole(3.2e14) == "3.2 × 10¹⁴"
    assert numbers.whole(math.inf) == "infinitely many"
    assert numbers.whole(None) == DASH


def test_labels_of_derived_and_own_metrics() -> None:
    assert numbers.label("latency_ms") == "latency"
    assert numbers.label("loss_validation") == "validation loss"
    assert numbers.label("energy_mj_predicted") == "predicted energy mj"


def test_what_is_given_in_per_cent_is_not_multiplied_again():
    assert numbers.show(93.5, "top1", "%") == "93.5%"
    assert numbers.show(0.935, "top1", "share") == "93.5%"
    assert numbers.show(0.935, "accuracy") == "93.5%"
