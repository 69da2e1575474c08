"""How well one-shot estimates rank NAS-Bench-201's cells, by how weights are shared, at equal cost.

A pass is one forward and backward pass of one subnet over one batch. Every method gets as many, with
one optimiser and one schedule; passes spent on anything but training, as the gradients that a split
is found by, count. What an optimiser step holds, one pass or several, is the method's own.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from espalier import nets, tasks
from espalier.bench.criteria import kendall
from espalier.errors import DataError
from espalier.estimators.one_shot import OneShot
from espalier.nets.close import CLOSENet
from espalier.nets.nb201 import OPERATORS, SPACE
from espalier.nets.nb201_supernet import NB201Supernet
from espalier.space import Candidate
from espalier.tasks import Task
from espalier.train import Fair, Paths, Recipe, Sandwich, Uniform, train_supernet
from espalier.train.loop import steps_of
from espalier.train.seeds import global_seed
from espalier.train.sharing import Curriculum
from espalier.train.splitting import FewShot, Splitting
from espalier.train.supernet import default_paths

_OPTIONS = len(SPACE.names) * len(OPERATORS)  # what a batch of gradient matching costs, in passes
_CELLS = 20  # purpose of the random stream of ranked cells
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Plan:
    """The small task, the supernet's size, the cost, and what is ranked."""

    source: str = "cifar10"
    size: int | None = 16
    train: int = 5000
    validation: int = 1000
    test: int = 200
    channels: int = 8
    cells: int = 1  # a stage
    batch: int = 64
    passes: int = 1500
    lr: float = 0.1
    ranked: int = 200
    images: int = 500  # of validation, to score a cell
    calibration: int = 256
    matching: int = 6  # batches that a split is found by
    look_up: bool = True  # digits are no data set of the table

    @property
    def task(self) -> Task:
        """The task, the same in every run."""
        return tasks.images(
            self.source, self.size, self.train, self.validation, self.test, name=self.source
        )

    def recipe(self, task: Task, passes: float) -> Recipe:
        """A training of so many optimiser steps, in whole epochs, one at least."""
        epochs = max(1, round(passes / steps_of(task, self.batch)))
        return Recipe(epochs=epochs, batch=self.batch, lr=self.lr, weight_decay=5e-4)


@dataclass(frozen=True)
class Method:
    """A supernet, how it is trained, and what a step costs."""

    make: Callable[[Plan, Task], tuple[nn.Module, Paths]]
    each: int = 1  # passes of an optimiser step
    matched: bool = False  # part of the passes finds a split
    more: float = 1.0  # times the passes of the others


SMOKE = Plan(
    "digits",
    None,
    train=128,
    validation=64,
    test=64,
    channels=4,
    batch=32,
    passes=16,
    ranked=8,
    images=64,
    calibration=32,
    matching=1,
    look_up=False,
)
PLANS = {
    "smoke": SMOKE,
    "cpu": Plan(),
    "gpu": Plan(
        size=None, train=40_000, channels=16, cells=5, passes=200_000, images=2000, matching=100
    ),
}


def _whole(plan: Plan, task: Task) -> NB201Supernet:
    return NB201Supernet(task.shape, task.classes, plan.channels, plan.cells)


def _blocks(plan: Plan, task: Task, blocks: int) -> CLOSENet:
    return CLOSENet(task.shape, task.classes, plan.channels, plan.cells, blocks)


def _one_block(plan: Plan, task: Task) -> CLOSENet:
    return _blocks(plan, task, 1)


def _plain(paths: Callable[[], Paths]) -> Callable[[Plan, Task], tuple[nn.Module, Paths]]:
    return lambda plan, task: (_whole(plan, task), paths())


def _close(blocks: int, at: tuple[float, ...]) -> Callable[[Plan, Task], tuple[nn.Module, Paths]]:
    def make(plan: Plan, task: Task) -> tuple[nn.Module, Paths]:
        supernet = _blocks(plan, task, blocks)
        return supernet, Curriculum(supernet, at) if at else Uniform()

    return make


def _default(plan: Plan, task: Task) -> tuple[nn.Module, Paths]:
    supernet = nets.make(
        "close", task.shape, task.classes, channels=plan.channels, cells=plan.cells
    )
    assert isinstance(supernet, nn.Module)
    return supernet, default_paths(supernet)


def _few(
    by: Any, at: float, whole: Callable[[Plan, Task], nn.Module] = _whole
) -> Callable[[Plan, Task], tuple[nn.Module, Paths]]:
    def make(plan: Plan, task: Task) -> tuple[nn.Module, Paths]:
        few = FewShot(whole(plan, task))
        return few, Splitting(few, task, by, at, plan.matching, plan.batch)

    return make


METHODS: Mapping[str, Method] = {
    "uniform": Method(_plain(Uniform)),
    "fair": Method(_plain(Fair), each=len(OPERATORS)),
    "sandwich": Method(_plain(Sandwich), each=3),
    "uniform_longer": Method(_plain(Uniform), more=1.5),
    "one_block": Method(_close(1, ())),
    "close": Method(_close(4, (0.2, 0.4, 0.6))),
    "late": Method(_default),  # what the family "close" does unless told otherwise
    "blocks_at_once": Method(_close(4, (0.0, 0.0, 0.0))),
    "split_by_gradients": Method(_few("gradients", 0.5), matched=True),
    "split_at_random": Method(_few("random", 0.5)),
    "one_block_split": Method(_few("gradients", 0.5, _one_block), matched=True),
}


def trained(method: str, plan: Plan, task: Task, seed: int) -> dict[str, Any]:
    """A supernet trained by a method: `supernet`, `paths`, and what it cost."""
    chosen = METHODS[method]
    with global_seed(seed):
        supernet, paths = chosen.make(plan, task)
    matching = plan.matching * _OPTIONS if chosen.matched else 0
    left = plan.passes * chosen.more - matching
    recipe = plan.recipe(task, left / chosen.each)
    start = time.process_time()
    history = train_supernet(supernet, task, recipe, seed, paths=paths)
    seconds = time.process_time() - start
    steps = recipe.epochs * steps_of(task, plan.batch)
    spent = steps * chosen.each + matching
    return {
        "supernet": supernet,
        "paths": paths,
        "cost": {"steps": steps, "passes": spent, "seconds": round(seconds, 2)},
        "loss": history[-1]["loss"],
    }


def cells(plan: Plan) -> list[Candidate]:
    """The cells that are ranked: random ones, none twice, the same for every seed and method."""
    codes = SPACE.enumerate()
    rows = np.random.default_rng(_CELLS).permutation(len(codes))[: plan.ranked]
    return list(SPACE.decode(codes[np.sort(rows)]))


def truth(ranked: list[Candidate], plan: Plan) -> dict[str, Array] | None:
    """Columns of the table for the cells that are ranked; None where the table is not here."""
    from espalier.bench.tables import load

    if not plan.look_up:
        return None
    try:
        table = load("nb201:dataset=cifar10")
    except DataError:
        return None
    rows = table.rows(SPACE.encode(ranked))
    names = {"validation": "val_acc", "test": "test_acc", "macs": "macs"}
    return {name: np.asarray(table.columns[column])[rows] for name, column in names.items()}


def estimates(supernet: nn.Module, plan: Plan, task: Task, ranked: list[Candidate]) -> Array:
    """One-shot accuracy of each cell, batch-norm statistics set for each."""
    scored = OneShot(
        supernet, task, images=plan.images, calibration_images=plan.calibration, precision="fp32"
    )
    return np.asarray(scored.estimate(ranked)["accuracy"], dtype=np.float64)


def row(method: str, plan: Plan, seed: int) -> dict[str, Any]:
    """Trains, estimates and ranks: Kendall's tau to the table, accuracy, cost, as plain JSON."""
    task, ranked = plan.task, cells(plan)
    made = trained(method, plan, task, seed)
    start = time.process_time()
    found = estimates(made["supernet"], plan, task, ranked)
    known = truth(ranked, plan)
    paths = made["paths"]
    split = paths.found.to_json() if isinstance(paths, Splitting) and paths.found else None
    return {
        "method": method,
        "seed": seed,
        "tau_test": None if known is None else kendall(found, known["test"]),
        "tau_validation": None if known is None else kendall(found, known["validation"]),
        "accuracy": {"mean": float(found.mean()), "best": float(found.max())},
        "loss": made["loss"],
        **made["cost"],
        "seconds_estimating": round(time.process_time() - start, 2),
        **({} if split is None else {"split": split}),
    }


def compared(
    methods: Sequence[str], plan: Plan, seed: int, out: Path | None
) -> dict[str, dict[str, Any]]:
    """The rows of several methods; kept in `out`, if given, and not computed again."""
    rows: dict[str, dict[str, Any]] = {}
    for method in methods:
        known = json.dumps([asdict(plan), method, seed])
        name = f"one_shot_{hashlib.sha256(known.encode()).hexdigest()[:12]}.json"
        file = None if out is None else Path(out) / name
        if file is not None and file.exists():
            rows[method] = json.loads(file.read_text())
            continue
        rows[method] = row(method, plan, seed)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(rows[method]))
    return rows


def ahead(rows: Mapping[str, Mapping[str, Any]], one: str, other: str) -> bool | None:
    """Whether one ranks better than the other; None where there is no table to tell."""
    taus = [rows[name]["tau_test"] for name in (one, other)]
    return None if None in taus else bool(taus[0] > taus[1])


def macs_tau(plan: Plan) -> float | None:
    """What counting ranks for nothing: tau of multiply-accumulates to test accuracy."""
    known = truth(cells(plan), plan)
    return None if known is None else kendall(known["macs"], known["test"])
