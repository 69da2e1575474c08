"""AutoPEFT: the recipe runs and goes on where it was, and its figures are what they are said to be."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from espalier import recipes  # noqa: E402
from espalier.recipes import autopeft  # noqa: E402
from espalier.recipes._parts.tuning import Tuning  # noqa: E402


@pytest.fixture(scope="module")
def out(tmp_path_factory: Any) -> Path:
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def found(out: Path) -> dict[str, Any]:
    return recipes.run("autopeft", "smoke", 0, out)


def test_it_runs_and_says_what_it_found(found: dict[str, Any]) -> None:
    assert json.loads(json.dumps(found)) == found
    setting = autopeft._SCALES["smoke"]
    assert found["evaluations"] == {"guided": 8, "random": 8, "grid": 8}
    assert found["evaluations"]["guided"] == setting.evaluations
    for own in found["fronts"].values():
        weights = [row["weights"] for row in own]
        values = [row["bits"] for row in own]
        assert sorted(weights, reverse=True) == weights
        assert min(weights) > 0  # the untuned model is no candidate
        assert sorted(values) == values  # fewer weights, more bits: no row is dominated
    check = found["check"]
    wins = check["above_random"] and check["above_grid"] and check["transfers"]
    assert check["holds"] == wins
    volumes = check["hypervolume"]
    assert check["above_random"] == (volumes["guided"] > volumes["random"])


def test_tuning_helps_and_the_count_is_what_learns(found: dict[str, Any]) -> None:
    rows = [row for own in found["fronts"].values() for row in own if row["weights"] > 0]
    assert min(row["test_bits"] for row in rows) < found["untuned_bits"][0]
    largest = max(rows, key=lambda row: row["weights"])
    setting = autopeft._SCALES["smoke"]
    base = setting.tuning.model(None)
    cut = autopeft.Adapters(("attention", "feed", "prefix"), prefix=setting.prefix)
    model = cut.bind(base, next(base.parameters())).adapted(base, largest["choices"])
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert learned == largest["weights"]


def test_the_same_candidate_is_tuned_alike(found: dict[str, Any]) -> None:
    setting = autopeft._SCALES["smoke"].tuning
    base, task = setting.model(None), setting.task(setting.domains[0], 0)
    bound = autopeft.Adapters(prefix=8).bind(base, next(base.parameters()))
    tuned = autopeft.Tuned(base, bound, setting, task, 0)
    one, two = (tuned({"adapter:attention": 2}) for _ in range(2))
    assert one["bits"] == two["bits"]


def test_a_study_is_not_run_again(
    out: Path, found: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a tuning that is recorded was run again")

    monkeypatch.setattr(Tuning, "fit", refuse)
    assert recipes.run("autopeft", "smoke", 0, out) == found
    configs = sorted((out / "autopeft-0" / "front").glob("*/adapter_config.json"))
    assert configs
    assert {peft.PeftConfig.from_pretrained(str(p.parent)).peft_type.value for p in configs} <= {
        "LORA",
        "PREFIX_TUNING",
    }


def test_the_volume_is_an_area() -> None:
    class Row:
        def __init__(self, bits: float, weights: float) -> None:
            values = {"test_bits": bits, "weights": weights}
            self.metrics = {k: type("R", (), {"value": v}) for k, v in values.items()}

    rows: Any = [Row(4.0, 99.0), Row(6.0, 9.0), Row(9.0, 0.0)]
    # of 8 bits and 10**4 - 1 weights: corners (0.5, 0.5) and (0.75, 0.25); the last is beyond
    expected = 0.5 * 0.5 + 0.25 * 0.25
    assert math.isclose(autopeft.volume(rows, 8.0, 9999.0), expected)
