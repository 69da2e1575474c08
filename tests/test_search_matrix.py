"""Every strategy with every estimator and every family."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

import espalier as esp
from espalier.nets import FAMILIES
from espalier.solvers import strategies
from espalier.testing import check_search

RECIPE = esp.Recipe(epochs=1, batch=32)


@functools.cache
def task() -> esp.Task:
    return esp.tasks.images("digits", train=64, validation=64, test=64)


class Perceptron(esp.Family):
    """A family that shares no weights, with a conditional and a real decision."""

    name = "perceptron"

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        self.shape, self.classes = shape, classes

    @property
    def space(self) -> esp.Space:
        return esp.Space(
            [
                esp.choice("hidden", False, True),
                esp.integer("width", 4, 64, when={"hidden": (True,)}),
                esp.real("dropout", 0.0, 0.5),
            ]
        )

    def build(self, candidate: esp.Candidate) -> torch.nn.Module:
        size = int(np.prod(self.shape))
        layers: list[torch.nn.Module] = [
            torch.nn.Flatten(),
            torch.nn.Dropout(float(candidate["dropout"])),
        ]
        if candidate["hidden"]:
            width = int(candidate["width"])
            layers += [torch.nn.Linear(size, width), torch.nn.ReLU()]
            size = width
        return torch.nn.Sequential(*layers, torch.nn.Linear(size, self.classes))


@functools.cache
def family(name: str) -> esp.Family:
    torch.manual_seed(0)
    if name == "perceptron":
        return Perceptron(task().shape, task().classes)
    return esp.nets.make(name, task().shape, task().classes, **SMALL.get(name, {}))


_BLOCKS = {"depth": (2, 1, 1), "stem": 8, "widths": (8, 8, 16), "head": 16}
SMALL: dict[str, dict[str, Any]] = {
    "darts": {"channels": 2, "cells": 3, "nodes": 2},
    "close": {"channels": 4, "cells": 1},
    "nb201-supernet": {"channels": 4, "cells": 1},
    "hybrid": {"depth": (1, 2), "expansion": (1, 2), "heads": 2},
    "multipath": _BLOCKS,
    "superkernel": _BLOCKS,
}


KINDS = ("trained", "one-shot")
WITH_ALL = (
    "mobilenet",
    "resnet",
)  # every strategy; the other families, which take longer, with one


def pairs(turn: int) -> list[tuple[str, str]]:
    """Both families and both kinds, paired one way and the other in turns: a strategy sees spaces and
    numbers, an estimator candidates."""
    one, other = WITH_ALL if turn % 2 else WITH_ALL[::-1]
    return [("perceptron", "trained"), (one, "trained"), (other, "one-shot")]


OTHERS = [(name, kind) for name in sorted(set(FAMILIES) - set(WITH_ALL)) for kind in KINDS]


@pytest.mark.parametrize(
    ("strategy", "name", "kind"),
    [(s, *pair) for turn, s in enumerate(strategies.STRATEGIES) for pair in pairs(turn)]
    + [("evolution", *pair) for pair in OTHERS],
)
def test_every_strategy_estimator_and_family(strategy: str, name: str, kind: str) -> None:
    made = family(name)
    estimator: esp.Estimator = (
        esp.estimators.Trained(made, task(), RECIPE)
        if kind == "trained"
        else esp.estimators.OneShot(made, task(), calibration_images=64)
    )
    count = 4 if name in (*WITH_ALL, "perceptron") else 2  # larger ones take longer a trial
    trials = check_search(
        made, estimator, lambda space, seed: strategies.make(strategy, space, seed), trials=count
    )
    assert len(trials) == count
