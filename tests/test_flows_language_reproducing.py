"""The command and the Python of a report ask for the very shrink that was made."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("transformers")
pytest.importorskip("ortools")

from espalier.cli import app
from espalier.compress.language.cache.cuts import Spans
from espalier.compress.language.cache.plan import Span
from espalier.compress.language.shape.structure import Heads, Units
from espalier.compress.language.weights.bits import WeightBits
from espalier.flows.language.limits import language_limits
from espalier.flows.language.reproducing import Asked, reproduce
from espalier.problem import Limit, SearchBudget, limits

WITHIN = {"bytes": "62.5%", "kv_bytes": "25%@4096", "params": 624076.8}
PLAIN = {"grouped": False, "measure": "divergence", "repair": True, "baselines": True, "threads": 1}
ODD = {"grouped": True, "measure": "loss", "repair": False, "baselines": False, "threads": 3}


def job(within: Any = WITHIN, decisions: Any = None, **more: Any) -> Any:
    asked = Asked(language_limits(within)[0], decisions)
    own = {**PLAIN, **more}
    asked = replace(asked, **{k: own.pop(k) for k in ("repair", "baselines", "threads")})
    return SimpleNamespace(
        folder=SimpleNamespace(path=Path("my llama")), task=SimpleNamespace(name="a.txt", context=96),
        budget=SearchBudget.parse("10min, 5 trials"), seed=7, context=4096, asked=asked, **own,
    )  # fmt: skip


@pytest.mark.parametrize("settings", [PLAIN, ODD])
@pytest.mark.parametrize("decisions", [None, "heads,bits,tables", ("heads", Units())])
def test_both_ask_for_the_same_again(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], decisions: Any
) -> None:
    found = reproduce(job(decisions=decisions, **settings))
    seen: list[Any] = []
    home = sys.modules["espalier.cli.shrink"]  # the package has a function of that name
    monkeypatch.setattr(home, "in_memory", lambda *given, **asked: seen.append((given, asked)))
    words = shlex.split(found["command"])
    done = CliRunner().invoke(app, words[1:])
    assert done.exit_code == 0, done.output
    (((model, text, *_), asked),) = seen
    stub = SimpleNamespace(shrink_language=lambda *given, **own: (given, own))
    given, own = eval(found["python"], {"esp": stub})
    assert (model, str(text)) == given == ("my llama", "a.txt")
    for within, budget, names in (
        (asked["within"], asked["budget"], asked["decisions"]),
        (own.pop("within"), own.pop("budget"), own.pop("decisions", None)),
    ):
        assert language_limits(within) == language_limits(WITHIN)
        assert SearchBudget.parse(budget) == SearchBudget(600, 5)
        assert names == (
            decisions if decisions is None or isinstance(decisions, str) else "heads,units"
        )
    for name, value in {**settings, "context": 96, "seed": 7}.items():
        assert asked[name] == own.get(name, PLAIN.get(name)) == value
    assert settings is ODD or not set(PLAIN) & set(own)


def test_cuts_that_no_name_stands_for_are_said_in_python_alone() -> None:
    cuts = (Heads(), Spans(rules=(Span(16, 0.5),)), WeightBits(options=(3,)))
    found = reproduce(job(decisions=cuts))
    assert found["command"] == ""
    names = {"Spans": Spans, "Span": Span, "WeightBits": WeightBits}
    stub = SimpleNamespace(shrink_language=lambda *_, **own: own["decisions"])
    assert eval(found["python"], {"esp": stub, **names}) == ["heads", *cuts[1:]]


@pytest.mark.parametrize(
    ("bound", "relative", "text"),
    [
        (624076.8, False, "624076.8"),
        (624077.0, False, "624077"),
        (0.6, True, "60%"),
        (1.0, True, "100%"),
        (0.0725, True, "7.25%"),
        (1 / 3, True, ""),
        (0.1 + 0.2, True, ""),
        (1e-6, True, ""),
        (0.1 + 0.2, False, ""),
    ],
)
def test_bounds_are_never_looser_than_asked(bound: float, relative: bool, text: str) -> None:
    said = Limit("bytes", bound, "<=", relative).amount()
    assert said == text or not text
    (read,) = limits({"bytes": said})
    assert read.relative == relative
    assert bound * (1 - 1e-15) <= read.bound <= bound
