"""XGen's pipeline: it runs, its stages are timed in pairs, and its files are what they are said to be."""

from __future__ import annotations

import json

import pytest
import torch

from espalier import recipes
from espalier.recipes.xgen import AGREES, FASTER, LOST, PLANS, STAGES, Bench


def test_the_pipeline_runs_and_its_stages_multiply() -> None:
    found = recipes.run("xgen", "smoke", 0)
    json.dumps(found)
    rows = found["stages"]
    assert [row["stage"] for row in rows] == list(STAGES)
    product = 1.0
    for row in rows:
        product *= row["of_the_stage_before"]
        assert row["of_eager"] == pytest.approx(product)
    check = found["check"]
    assert check["product_of_stages"] == pytest.approx(product)
    assert check["lost"] == pytest.approx(rows[0]["accuracy"] - rows[3]["accuracy"])
    agrees = abs(check["product_of_stages"] / check["latency_of_eager"] - 1) <= AGREES
    kept = check["latency_of_eager"] <= FASTER and check["lost"] <= LOST
    assert check["holds"] == (agrees and kept)
    assert rows[2]["bytes"] < rows[1]["bytes"]
    assert 0 < found["kept_widths"] < 1


def test_ratios_are_of_the_two_that_were_given() -> None:
    bench = Bench(PLANS["smoke"], torch.zeros(1, 1, 8, 8), 0)
    times = iter([2.0, 6.0, 6.0, 2.0, 2.0, 6.0])
    order = iter([[0, 1], [1, 0], [0, 1]])

    class Told:
        def permutation(self, count: int) -> list[int]:
            return next(order)

    bench.rng = Told()  # type: ignore[assignment]
    bench.ms = lambda run: next(times)  # type: ignore[method-assign]
    assert bench.ratio(lambda: None, lambda: None) == pytest.approx(1 / 3)
