"""What all tests share: one thread, and where real data is."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Two test processes on two cores: more than one thread each makes both crawl.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first, so that none is the last of its process alone."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish() -> None:
    """What the libraries hold is not looked through for garbage again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def real_data() -> Path:
    """The folder that ESPALIER_DATA points to; the test skips, and says so, without it."""
    folder = os.environ.get("ESPALIER_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("needs real data: set ESPALIER_DATA to its folder (see the docs)")
    return Path(folder)


@pytest.fixture(scope="session", autouse=True)
def watched() -> Iterator[Callable[[float], float]]:
    """No measurement waits to see whether the machine is busy: beside other tests it is. Gives what
    would."""
    from espalier.costs import machine

    watch = machine.load_now
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "load_now", lambda seconds=0.1: 0.0)
        yield watch


@pytest.fixture(scope="module")
def few_drawn() -> Iterator[None]:
    """Families conform on half as many random candidates: for those whose candidates take long."""
    from espalier.testing import family

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(family, "RANDOM", 3)
        yield


@pytest.fixture(scope="module")
def quick_tables() -> Iterator[None]:
    """Tables of one timing a piece and few networks: for tests of what is done with them."""
    from espalier.costs import calibration, context, pace

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pace.Pace, "now", lambda self: 1.0)
        patch.setattr(context, "_UNSURE", float("inf"))
        for name, count in (("fit", 4), ("held_out", 3)):
            patch.setitem(calibration.Calibration.__init__.__kwdefaults__, name, count)
        yield


@pytest.fixture(scope="module")
def pieces_once() -> Iterator[None]:
    """Within a module, the pieces of a shipped family are listed once: they hang on its space and
    weights' shapes."""
    from espalier.costs import pieces

    make, known = pieces._made, dict[Any, Any]()

    def once(family: Any) -> Any:
        if not type(family).__module__.startswith("espalier.nets"):
            return make(family)
        shapes = tuple((name, tuple(p.shape)) for name, p in family.named_parameters())
        key = type(family), tuple(family.shape), family.classes, family.space.fingerprint, shapes
        if key not in known:
            known[key] = family, make(family)  # pieces hold their family weakly
        return known[key][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "_made", once)
        yield


@pytest.fixture(scope="module")
def tables_once(quick_tables: None, pieces_once: None) -> Iterator[None]:
    """Within a module, a latency table is measured once for each space and runtime.

    For tests of what is done with a table; how it is measured has tests of its own.
    """
    from espalier.costs import PredictedLatency

    calibrate, known = PredictedLatency.calibrate, dict[tuple[str, str], dict[str, Any]]()

    def once(self: PredictedLatency, *args: Any, **kwargs: Any) -> dict[str, Any]:
        key = self.space.fingerprint, repr(self.runtime)
        if key not in known:
            known[key] = calibrate(self, *args, **kwargs)
        self._use(type(self).from_json(self.family, self.runtime, known[key])._calibrated())
        return dict(known[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PredictedLatency, "calibrate", once)
        yield
