"""What the differentiable searches on NAS-Bench-201 share: the task, the budget, the answer.

A cell is found on a small task and looked up: nothing of the table is seen by the search, only the
validation images of the small task. Beside it stands random search that takes as long.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from espalier import tasks
from espalier.errors import DataError
from espalier.nets.nb201 import NB201, SPACE
from espalier.nets.nb201_supernet import NB201Supernet
from espalier.recipes._parts.nb201_steps import bytes_kept
from espalier.solvers.relax import Magnitude, Relaxed, Settings, relax
from espalier.space import Candidate
from espalier.tasks import Task
from espalier.train import Recipe as Training
from espalier.train import evaluate, fit
from espalier.train.seeds import global_seed, mixed

DATASETS = ("cifar10", "cifar100")  # columns of the table; searched on the first
PARAMETERLESS = ("none", "skip_connect", "avg_pool_3x3")
# what is read off by size passes over "none", as in the papers of DARTS and PC-DARTS: how strong it is
# says nothing, since a norm follows
DERIVED = Magnitude(without=("none",))
ABOUT = """\
The task: CIFAR-10 at 16x16 pixels, 500 images for the weights and 500 for the architecture, 1,000 to
select by; one cell a stage with 8 channels; 80 epochs of 8 steps, the architecture's rate raised to
0.02 because there are thirty times fewer steps than as published. The operators read off are
the strongest but "none", as the papers of DARTS and PC-DARTS derive them (NAS-Bench-201's own runs take "none"
too). The cell found is looked up in
NAS-Bench-201 (200 epochs, whole network); the search reads nothing of the table. Random search trains
cells alone, 12 epochs each on all 1,000 images, for as much processor time as the search took, and
takes the best on the same validation images."""
_CELLS, _ALONE = 2, 3  # purposes of random streams


@cache
def _task(source: str, size: int | None, train: int, validation: int, test: int) -> tasks.ImageTask:
    # torch imports its compiler with the first optimiser: that is no part of a search either
    torch.optim.SGD([torch.zeros(1)], lr=1.0)
    return tasks.images(source, size, train, validation, test)


@dataclass(frozen=True)
class Setting:
    """The small task, the size of the supernet, how long to search, how to train one cell alone."""

    source: str = "cifar10"
    size: int | None = 16
    train: int = 1000
    validation: int = 1000
    test: int = 1000
    channels: int = 8
    cells: int = 1  # a stage
    search: Settings = field(
        default_factory=lambda: Settings(epochs=80, arch_lr=0.02, precision="fp32")
    )
    alone: Training = field(default_factory=lambda: Training(epochs=12, lr=0.1))
    look_up: bool = True  # digits are no data set of the table
    accelerated: bool = False  # computes on CUDA, where there is one

    @property
    def task(self) -> Task:
        """The task, the same in every run; read once, for it is no part of a search's time."""
        return _task(self.source, self.size, self.train, self.validation, self.test)

    @property
    def device(self) -> str:
        """Where networks compute."""
        return "cuda" if self.accelerated and torch.cuda.is_available() else "cpu"

    def supernet(self, task: Task, seed: int, partial: int = 1) -> NB201Supernet:
        """Fresh weights, decided by the seed."""
        with global_seed(seed):
            made = NB201Supernet(
                task.shape, task.classes, self.channels, self.cells, partial, affine=False
            )
        return made.to(self.device)

    def clock(self) -> float:
        """Seconds: of the processor, which other processes do not lengthen; of the wall on CUDA."""
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.monotonic()


SCALES = {
    "smoke": Setting(
        "digits",
        None,
        train=64,
        validation=40,
        test=40,
        channels=4,
        search=Settings(epochs=1, batch=32),
        alone=Training(epochs=1, batch=32),
        look_up=False,
    ),
    "cpu": Setting(),
    "gpu": Setting(
        size=None,
        train=45_000,
        validation=5_000,
        test=10_000,
        channels=16,
        cells=5,
        search=Settings(epochs=50),
        alone=Training(epochs=25, lr=0.1),
        accelerated=True,
    ),
}


@dataclass(frozen=True)
class Method:
    """A search: its name, the slots of `relax` made for a setting, and changes to the settings.

    `partial`: the share of channels that are mixed is one over it (PC-DARTS).
    """

    name: str
    slots: Callable[[Setting], Mapping[str, Any]] = lambda setting: {}
    settings: Callable[[Settings], Settings] = lambda settings: settings
    partial: int = 1


def searched(method: Method, setting: Setting, seed: int, out: Path | None) -> dict[str, Any]:
    """One search and its answer on the table, as plain JSON; kept, so that recipes share it."""

    def run() -> dict[str, Any]:
        task = setting.task
        supernet = setting.supernet(task, seed, method.partial)
        slots = {"selection": DERIVED, **method.slots(setting)}
        start = setting.clock()
        found = relax(supernet, task, settings=method.settings(setting.search), seed=seed, **slots)
        spent = setting.clock() - start
        told = getattr(slots.get("selection"), "found", None)
        return {
            **answer(found.candidate, setting),
            "seconds": spent,
            "wall_seconds": found.seconds,
            "bytes_kept": bytes_kept(method, setting, seed),
            "monitor": found.monitor,
            "over_epochs": _course(found),
            "probabilities": found.probabilities,
            **({} if told is None else {"selection": told}),
        }

    what = f"{method.name} {method.settings(setting.search)} {setting} without {DERIVED.without}"
    return kept(what, seed, out, run)


def _course(found: Relaxed) -> dict[str, list[float]]:
    """What shows a collapse, epoch after epoch."""
    shown = ("loss", "arch_loss", "entropy", "parameterless")
    return {name: [row[name] for row in found.history if name in row] for name in shown}


def answer(candidate: Candidate, setting: Setting) -> dict[str, Any]:
    """A cell, its operations without parameters, and what the table knows of it."""
    return {
        "cell": candidate.to_json(),
        "parameterless": sum(candidate[name] in PARAMETERLESS for name in SPACE.names),
        "table": looked_up(candidate) if setting.look_up else None,
    }


def looked_up(candidate: Candidate) -> dict[str, Any] | None:
    """Accuracies in % after 200 epochs, and the share of all cells with a lower one on test.

    None where the table is not at hand.
    """
    from espalier.bench.tables import load

    found = {}
    for dataset in DATASETS:
        try:
            table = load(f"nb201:dataset={dataset}")
        except DataError:
            return None
        row = int(table.rows(SPACE.encode([candidate]))[0])
        test = table.columns["test_acc"]
        found[dataset] = {
            "validation": float(table.columns["val_acc"][row]),
            "test": float(test[row]),
            "better_than": float(np.mean(test < test[row])),
        }
    return found


def one_random_cell(setting: Setting) -> dict[str, float] | None:
    """The test accuracy in % to be expected of a cell drawn at random, by data set."""
    from espalier.bench.tables import load

    if not setting.look_up:
        return None
    try:
        found = {d: load(f"nb201:dataset={d}").columns["test_acc"] for d in DATASETS}
    except DataError:
        return None
    return {d: float(v.mean()) for d, v in found.items()}


def by_chance(setting: Setting, seed: int, seconds: float, out: Path | None) -> dict[str, Any]:
    """Random search for so many `seconds`: cells trained alone, the best of them on validation.

    All are trained alike, on all of train. At least two are, and the last one may overrun.
    """
    trained: list[dict[str, Any]] = []
    while len(trained) < 2 or sum(one["seconds"] for one in trained) < seconds:
        trained.append(alone(setting, seed, len(trained), out))
    best = max(trained, key=lambda one: float(one["accuracy"]))
    return {
        **answer(SPACE.candidate(best["cell"]), setting),
        "trained": len(trained),
        "seconds": sum(one["seconds"] for one in trained),
    }


def alone(setting: Setting, seed: int, index: int, out: Path | None) -> dict[str, Any]:
    """The random cell of a number, trained by itself: its accuracy on validation, the time."""

    def run() -> dict[str, Any]:
        task = setting.task
        start = setting.clock()
        rng = np.random.default_rng([seed, _CELLS, index])
        candidate = SPACE.decode(SPACE.sample(1, rng))[0]
        family = NB201(task.shape, task.classes, setting.channels, setting.cells)
        with global_seed(seed, _ALONE, index):
            network = family.build(candidate).to(setting.device)
        fit(network, task, setting.alone, mixed(seed, index))
        accuracy = evaluate(network, task, "validation")["accuracy"]
        spent = setting.clock() - start
        return {"cell": candidate.to_json(), "accuracy": accuracy, "seconds": spent}

    return kept(f"alone {index} {setting}", seed, out, run)


def compared(
    found: Mapping[str, dict[str, Any]], which: str, setting: Setting, seed: int, out: Path | None
) -> dict[str, Any]:
    """The numbers of a check: every search, and random search that takes as long as `which`.

    `test` has accuracies in % by search and data set of the table, None where that is not at hand.
    """
    chance = by_chance(setting, seed, found[which]["seconds"], out)
    every = {**found, "random search": chance}
    test = {name: tests(one) for name, one in every.items()}
    test["one random cell"] = one_random_cell(setting)
    mine, other = test[which], test["random search"]
    return {
        "test": test,
        "parameterless": {name: one["parameterless"] for name, one in every.items()},
        "seconds": {name: one["seconds"] for name, one in every.items()},
        "trained_by_random_search": chance["trained"],
        "below_random_search": lower(mine, other),
        "above_random_search": lower(other, mine),
    }


def tests(found: Mapping[str, Any]) -> dict[str, float] | None:
    """Test accuracies in % of a found cell by data set, None without the table."""
    table = found["table"]
    return None if table is None else {d: float(table[d]["test"]) for d in DATASETS}


def lower(one: Mapping[str, float] | None, other: Mapping[str, float] | None) -> bool:
    """Whether one cell is worse than another on the data set of the search; False without a table."""
    return one is not None and other is not None and one[DATASETS[0]] < other[DATASETS[0]]


_FOUND: dict[str, dict[str, Any]] = {}  # of this process, where nothing is kept on disk


def kept(
    what: str, seed: int, out: Path | None, make: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """A result by what it depends on: from this process, from `out`, or made now."""
    digest = hashlib.sha256(what.encode()).hexdigest()[:12]
    name = f"nb201_{what.split()[0]}_{digest}_{seed}.json"
    if name not in _FOUND:
        file = None if out is None else Path(out) / name
        if file is not None and file.exists():
            _FOUND[name] = json.loads(file.read_text())
        else:
            _FOUND[name] = make()
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(_FOUND[name], indent=1))
    copied: dict[str, Any] = json.loads(json.dumps(_FOUND[name]))
    return copied
