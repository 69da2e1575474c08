"""What one shape for all layers costs, told, or why it is not."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("ortools")

from espalier.compress.language.shape.structure import Units
from espalier.errors import BudgetError
from espalier.flows.language import grouped
from espalier.flows.language.grouped import price_of_one_shape
from espalier.flows.language.result import one_shape
from espalier.flows.language.shrink import shrink_language
from espalier.problem import Limit
from espalier.testing.language import tiny

TEXT = " ".join(f"{i} and {i * 7 % 100} make {i + i * 7 % 100}." for i in range(100))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("grouped")
    model = tiny("llama", vocabulary=256, context=16, hidden=16, heads=2, groups=1, width=32)
    model.save_pretrained(root / "llama")
    (root / "text.txt").write_text(TEXT)
    return shrink_language(
        root / "llama", root / "text.txt", out=root / "run", within={"bytes": "95%"}, grouped=True,
        decisions="units", budget="60s", context=8, windows=(4, 2, 2), repair=False, baselines=False,
    )  # fmt: skip


def again(found: Any, **changed: Any) -> Any:
    """The job with nothing recorded of it."""
    twin = copy.copy(found._job)
    twin.study = SimpleNamespace(once=lambda key, compute: compute())
    twin.__dict__.update(changed)
    return twin


def test_the_price_is_told_with_both_losses(found: Any) -> None:
    assert set(found._job.one_shape) == {"one shape", "layers apart"}
    assert any("Layers of one shape: " in note for note in found.to_json()["notes"])


@pytest.mark.parametrize("reason", ["time", "times", "limits"])
def test_why_the_price_is_not_known_is_told(
    found: Any, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    job, told = again(found), ""
    if reason == "time":
        job = again(found, budget=replace(job.budget, seconds=1e-6))
        told = "more than 25% of the budget"
    if reason == "times":
        job, told = again(found, limits=(Limit("decode_ms", 1.0),)), "only times are limited"
    if reason == "limits":

        def solved(*_: Any) -> None:
            raise BudgetError("bytes <= 7 can't be kept")

        monkeypatch.setattr(grouped, "solved", solved)
        told = "with layers apart: bytes <= 7 can't be kept"
    job.one_shape = price_of_one_shape(job, [Units()], 4, found.best.candidate)
    line = one_shape(job)
    assert line.startswith("What it costs that layers have one shape is not told: ")
    assert told in line


def test_cuts_on_experts_and_adapters_have_names_of_their_own() -> None:
    from espalier.compress.language import Adapters, ExpertCount, Experts
    from espalier.compress.language.anatomy import Experts as Part

    assert Experts is Part
    assert (ExpertCount.kind, Adapters.kind) == ("experts", "adapter")
