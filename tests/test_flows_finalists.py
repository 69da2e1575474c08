"""Who keeps a latency limit as measured, also where the machine has a slow moment."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from espalier.errors import BudgetError
from espalier.flows import finalists
from espalier.problem import Limit, Reading
from espalier.space import Space, integer

SPACE = Space([integer("width", 1, 4)])


class SlowMoment:
    """A job whose latency is the width in ms; the first `slow` measurements take twice as long."""

    limits = (Limit("latency_ms", 1.5),)
    runtime = SimpleNamespace(name="a runtime")

    def __init__(self, slow: int) -> None:
        self.slow = slow
        self.known: dict[tuple[str, Any], Reading] = {}

    def price(self, candidate: Any) -> dict[str, Reading]:
        return {"latency_ms": Reading(float(candidate["width"]), "ms", "predicted")}

    def measured(self, candidate: Any, network: Any, key: str) -> Reading:
        if (key, candidate) not in self.known:
            factor = 2.0 if self.slow > 0 else 1.0
            self.slow -= 1
            reading = Reading(factor * float(candidate["width"]), "ms", "measured")
            self.known[key, candidate] = reading
        return self.known[key, candidate]

    def keeps(self, readings: dict[str, Reading], margin: float = 1.0) -> bool:
        return readings["latency_ms"].value <= 1.5 * margin


def trials() -> list[Any]:
    candidates = SPACE.decode(SPACE.enumerate())
    readings = [{"latency_ms": Reading(float(c["width"]), "ms", "predicted")} for c in candidates]
    return [
        SimpleNamespace(candidate=c, metrics=r, state="done")
        for c, r in zip(candidates, readings, strict=True)
    ]


def test_a_slow_moment_does_not_refuse_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finalists, "_PAUSE", 0.0)
    job: Any = SlowMoment(slow=1)
    found = finalists._smallest_within(job, trials())
    assert [c["width"] for c in found] == [1]


def test_what_is_slow_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finalists, "_PAUSE", 0.0)
    job: Any = SlowMoment(slow=100)
    with pytest.raises(BudgetError, match="as measured: the cheapest of 4 trials takes 2 ms"):
        finalists._smallest_within(job, trials())
