"""The sentences of a report: the verdict, broken limits, baselines that are ahead."""

from __future__ import annotations

from typing import Any

import pytest

from espalier.report import verdict
from espalier.report.reading import Result
from report_sample import sample_result


@pytest.fixture
def raw() -> dict[str, Any]:
    return sample_result()


def _accuracy(entry: dict[str, Any], value: float) -> None:
    entry["metrics"]["accuracy"]["value"] = value


def test_the_verdict_is_one_sentence(raw: dict[str, Any]) -> None:
    said = verdict.verdict(Result(raw))
    assert said == (
        "0.283 ms of 0.3 ms, 51.4k of 60k parameters, 1.73M of 2M MACs, 98.1% test accuracy"
    )
    assert verdict.broken(Result(raw)) == []
    assert verdict.ahead(Result(raw)) == []


def test_without_limits_the_costs_stand_alone(raw: dict[str, Any]) -> None:
    raw["question"]["limits"] = []
    said = verdict.verdict(Result(raw))
    assert said == "0.283 ms, 51.4k parameters, 1.73M MACs, 98.1% test accuracy"


def test_a_broken_limit_is_said_with_how_far(raw: dict[str, Any]) -> None:
    raw["best"]["metrics"]["latency_ms"]["value"] = 0.312
    result = Result(raw)
    assert verdict.verdict(result).startswith("0.312 ms, over the limit of 0.3 ms")
    assert verdict.broken(result) == [
        "The limit latency ≤ 0.3 ms is not kept: 0.312 ms measured, 4.0% beyond it."
    ]


def test_a_lower_bound_reads_the_other_way(raw: dict[str, Any]) -> None:
    raw["question"]["limits"] = [{"metric": "params", "op": ">=", "bound": 1e5, "unit": ""}]
    result = Result(raw)
    assert "under the limit of 100k" in verdict.verdict(result)
    assert len(verdict.broken(result)) == 1


def test_a_baseline_within_noise_is_named_and_called_so(raw: dict[str, Any]) -> None:
    _accuracy(raw["baselines"][1], 0.987)
    (said,) = verdict.ahead(Result(raw))
    assert said.startswith("Random search is ahead on test accuracy: 98.7% against 98.1%.")
    assert "within the noise of 359 test examples (±1.9 points)" in said
    assert verdict.lead(Result(raw)) == ""


def test_a_baseline_beyond_noise_is_called_so(raw: dict[str, Any]) -> None:
    raw["question"]["task"]["test"] = 100_000
    _accuracy(raw["baselines"][0], 0.99)
    (said,) = verdict.ahead(Result(raw))
    assert said.startswith("Scaled by hand is ahead")
    assert said.endswith("more than the noise of 100,000 test examples explains.")


def test_a_baseline_that_breaks_a_limit_is_not_ahead(raw: dict[str, Any]) -> None:
    _accuracy(raw["baselines"][0], 0.99)
    raw["baselines"][0]["metrics"]["params"]["value"] = 70_000
    assert verdict.ahead(Result(raw)) == []


def test_an_equal_but_cheaper_baseline_is_said(raw: dict[str, Any]) -> None:
    _accuracy(raw["baselines"][1], 0.981)
    assert verdict.ahead(Result(raw)) == [
        "Random search reaches the same accuracy (98.1%) with less latency."
    ]


def test_for_a_loss_smaller_is_ahead(raw: dict[str, Any]) -> None:
    for entry, value in (
        (raw["best"], 0.30),
        (raw["baselines"][0], 0.25),
        (raw["baselines"][1], 0.4),
    ):
        metrics = entry["metrics"]
        metrics["loss"] = {**metrics.pop("accuracy"), "value": value, "unit": "nats"}
    result = Result(raw)
    assert result.quality == "loss"
    assert verdict.ahead(result) == [
        "Scaled by hand is ahead on test loss: 0.25 nats against 0.3 nats."
    ]


def test_the_lead_says_what_the_test_split_can_tell(raw: dict[str, Any]) -> None:
    said = verdict.lead(Result(raw))
    assert said.startswith("Ahead of the best baseline, random search, by 0.9 points")
    assert "only beyond 2.3 points" in said


def test_nothing_known_is_said_plainly() -> None:
    assert verdict.verdict(Result({})) == "No trained network in this result"
