"""Checks that any ledger must pass: `check_ledger(folder)` for ours, or with a class like it."""

from __future__ import annotations

import json
import math
from pathlib import Path

from espalier.errors import StudyError
from espalier.problem import Reading
from espalier.space import Candidate
from espalier.study.executor import Outcome
from espalier.study.ledger import Ask, Ledger, NewTrial

_META = {"identity": {"task": "très", "limits": [1, 2.5, None]}, "seed": 3}


def check_ledger(folder: Path, kind: type[Ledger] = Ledger) -> None:
    """Every check, each on a new file in `folder`. Raises `AssertionError` with the rule broken."""
    check_values(folder / "values.sqlite", kind)
    check_asks(folder / "asks.sqlite", kind)
    check_trials(folder / "trials.sqlite", kind)
    check_all_or_nothing(folder / "whole.sqlite", kind)
    check_readers(folder / "readers.sqlite", kind)


def _ask(number: int, state: object = "s") -> Ask:
    return Ask([[number, 0]], [0.0], {"asked": 1}, {"state": state, "rng": 2**120 + number})


def _new(*numbers: int) -> list[NewTrial]:
    return [NewTrial(Candidate({"x": n}), {"cost": Reading(float(n), "u")}) for n in numbers]


def check_values(path: Path, kind: type[Ledger]) -> None:
    """What was recorded is read back the same, also by another opening."""
    ledger = kind.create(path, _META)
    assert ledger.recorded("table") is None, "nothing was recorded under the key"
    value = {"a": [1, 2.5, None, True], "nan": math.nan, "inf": math.inf, "text": "é\n'"}
    ledger.record("table", value)
    ledger.event("start", {"pid": 1})
    ledger.event("end", {})
    ledger.set_meta("seed", 4)
    ledger.close()
    again = kind.open(path)
    found = again.recorded("table")
    assert found is not None
    assert repr(found[0]) == repr(value), f"recorded {value}, read {found[0]}"
    assert [e["kind"] for e in again.events()] == ["start", "end"], "events keep their order"
    assert again.meta() == {**_META, "seed": 4}, "meta is read back, the last value of a key"
    again.close()


def check_asks(path: Path, kind: type[Ledger]) -> None:
    """The newest ask of each phase is given, exactly, with the state after it."""
    ledger = kind.create(path, _META)
    assert ledger.last_ask("a") is None, "no ask was made"
    for number in range(3):
        ledger.add_ask("a", "toy", _ask(number), _new(number))
    ledger.add_ask("b", "toy", _ask(7), [])
    ledger.add_ask("b", "toy", _ask(8), [])
    ledger.close()
    again = kind.open(path)
    for phase, number in (("a", 2), ("b", 8)):
        last = again.last_ask(phase)
        assert last is not None
        assert (last.codes, last.state) == (_ask(number).codes, _ask(number).state), (
            f"the newest ask of {phase!r} must be read back exactly, got {last}"
        )
    assert (again.idle_asks("a"), again.idle_asks("b")) == (0, 2), "asks without trials are counted"
    again.close()


def check_trials(path: Path, kind: type[Ledger]) -> None:
    """A trial goes from waiting to running to done or failed, and keeps what it had."""
    ledger = kind.create(path, _META)
    made = ledger.add_ask("a", "toy", _ask(0), _new(5, 6, 7))
    assert [t.position for t in made] == [0, 1, 2], "positions count within the phase"
    assert {t.state for t in made} == {"waiting"}, "a new trial waits"
    for trial in made[:2]:
        ledger.start(trial.id, "me")
    done = ledger.finish(
        made[0].id, {"q": Reading(math.nan)}, 0.5, "", Outcome(made[0].id, {}, "", 2.0, 3, "w")
    )
    assert (done.state, done.violation, done.seconds, done.attempts) == ("done", 0.5, 2.0, 3)
    assert math.isnan(done.metrics["q"].value), "NaN is kept"
    assert [t.state for t in ledger.trials("a")] == ["done", "running", "waiting"]
    ledger.release("a")
    assert [t.state for t in ledger.trials("a")] == ["done", "waiting", "waiting"]
    bad = Outcome(made[1].id, None, "Traceback é", 1.0, 1, "w")
    ledger.start(made[1].id, "me")
    failed = ledger.finish(made[1].id, made[1].metrics, 0.0, "Traceback é", bad)
    assert (failed.state, failed.error, failed.attempts) == ("failed", "Traceback é", 2)
    ledger.stop("a", "deadline")
    assert [t.candidate["x"] for t in ledger.trials("a")] == [5, 6], "what waited is withdrawn"
    ledger.add_trials("b", None, _new(5))
    assert [t.phase for t in ledger.trials()] == ["a", "a", "b"], "all phases, in order"
    assert ledger.trials("b")[0].metrics == {"cost": Reading(5.0, "u")}
    ledger.close()


def check_all_or_nothing(path: Path, kind: type[Ledger]) -> None:
    """An ask and its trials are recorded together or not at all, and a candidate once a phase."""
    ledger = kind.create(path, _META)
    ledger.add_ask("a", "toy", _ask(0), _new(1))
    try:
        ledger.add_ask("a", "toy", _ask(1, state="lost"), _new(2, 1))
    except StudyError:
        pass
    else:
        raise AssertionError("a candidate can't have two trials in one phase")
    last = ledger.last_ask("a")
    assert last is not None
    assert last.state == _ask(0).state, "an ask whose trials were not recorded must leave no trace"
    assert len(ledger.trials("a")) == 1, "trials of a failed ask must leave no trace"
    ledger.add_ask("a", "toy", _ask(2), _new(2))
    ledger.close()


def check_readers(path: Path, kind: type[Ledger]) -> None:
    """A reader sees what was committed, also while the driver writes, and changes nothing."""
    ledger = kind.create(path, _META)
    reader = kind.open(path, writable=False)
    ledger.add_trials("a", None, _new(1))
    assert len(reader.trials()) == 1, "a reader sees what the driver committed"
    try:
        reader.set_meta("seed", 9)
    except StudyError:
        pass
    else:
        raise AssertionError("a reader must not write")
    reader.close()
    assert json.dumps(ledger.meta()) == json.dumps(_META), "a reader changed the ledger"
    ledger.close()
