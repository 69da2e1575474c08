"""DeepMAD's design for limits of one's own: kept as the package counts, or refused in a line."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from espalier.costs import count
from espalier.errors import BudgetError, EspalierError, MissingExtra
from espalier.nets.bottlenecks import Bottlenecks, Layout
from espalier.recipes._parts.deepmad import entropy as deepmad
from espalier.recipes.deepmad import design

pytest.importorskip("ortools")

SMALL = Layout((1, 2), 1)
HOW_TO = Path(__file__).parents[1] / "docs" / "howto" / "own-family.md"
LIMITS = {"macs": 4e5, "params": 8e3}


# --- costs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout",
    [Layout((1, 2, 1, 2), 2), Layout((1, 2), 1, head=24), Layout((1, 2, 2), 2, True, 48)],
    ids=["plain", "head", "depthwise"],
)
def test_with_classes_costs_are_those_of_the_package(layout):
    wanted = deepmad.Wanted(
        layout, 16, 1, 1, weights=(1,) * layout.strides.count(2) + (8,), classes=7
    )
    width = (48, 96) if layout.depthwise else (8, 16)
    family = Bottlenecks((3, 16, 16), 7, layout, stem=(8, 16), out=(16, 24, 32), inner=width)
    for candidate in family.space.decode(family.space.sample(2, np.random.default_rng(0))):
        found = deepmad.measured(wanted, candidate)
        counted = count(family.build(candidate), torch.zeros(1, 3, 16, 16))
        assert (found["flops"], found["params"]) == (counted.macs, counted.params)


# --- the design ---------------------------------------------------------------------------------------


def test_the_design_of_the_how_to_keeps_its_limits_and_is_a_network(capsys):
    (code,) = re.findall(r"^```py\n(.*?)^```", HOW_TO.read_text(), re.M | re.S)
    names: dict[str, Any] = {}
    exec(compile(code, str(HOW_TO), "exec"), names)
    found, model, x = names["small"], names["network"], torch.rand(2, 1, 8, 8)
    assert capsys.readouterr().out.startswith(str(found.choices))
    assert found.layout == SMALL
    counted = count(model, x)
    assert (found.macs, found.params) == (counted.macs, counted.params)
    assert found.macs <= LIMITS["macs"]
    assert found.params <= LIMITS["params"]
    assert found.effectiveness <= 0.3
    assert model(x).shape == (2, 10)
    for n, group in enumerate(SMALL.groups, 1):
        blocks = list(model.get_submodule(group).children())
        assert len(blocks) == found.choices[f"group{n}.depth"]
        convolutions = [m for m in blocks[0].body.modules() if isinstance(m, torch.nn.Conv2d)]
        out, inner, kernel = (found.choices[f"group{n}.{p}"] for p in ("out", "inner", "kernel"))
        assert [m.out_channels for m in convolutions] == [inner, inner, out]
        assert convolutions[1].kernel_size == (kernel, kernel)

    # it scores what the closed form says, and at most 1% less than the best of many others
    wanted = deepmad.Wanted(SMALL, 8, 4e5, 8e3, 0.3, (1, 8), channels=1, classes=10)
    own = deepmad.measured(wanted, found.choices)
    assert found.score == own["score"]
    assert found.effectiveness == own["effectiveness"]
    family = Bottlenecks((1, 8, 8), 10, SMALL, out=range(16, 97, 16), inner=(8, 16), depth=(1, 2))
    others = [deepmad.measured(wanted, c) for c in family.space.decode(family.space.enumerate())]
    kept = [o["score"] for o in others if deepmad.kept(wanted, o)]
    assert len(kept) > 10
    assert found.score >= 0.99 * max(kept)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"macs": 1e4}, "10000 macs can't be kept: the smallest network of this layout takes"),
        ({"params": 500}, "500 params can't be kept"),
        (
            {"effectiveness": 0.05},
            "no design within 400,000 macs, 8,000 params, effectiveness 0.05",
        ),
        ({"macs": 0}, "macs must be a positive number, got 0"),
        ({"params": float("nan")}, "params must be a positive number, got nan"),
        ({"effectiveness": -1}, "effectiveness must be a positive number"),
    ],
)
def test_limits_that_can_not_be_kept_are_refused_in_one_line(changed, told):
    given = {"shape": (1, 8, 8), "classes": 10, **LIMITS, "layout": SMALL, "seconds": 0.6}
    with pytest.raises(BudgetError) as caught:
        design(**{**given, **changed})
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"shape": (1, 8, 6)}, "shape must be channels, side, side"),
        ({"shape": (1, 9, 9)}, "9, must be a multiple of the layout's strides, 2"),
        ({"classes": 0}, "classes must be 1 or more"),
        ({"layout": Layout((1, 3))}, "strides of the layout must be 1 or 2"),
        ({"kernels": (4,)}, "kernels must be odd"),
        ({"seconds": 0}, "seconds must be more than 0"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(changed, told):
    given = {"shape": (1, 8, 8), "classes": 10, **LIMITS, "layout": SMALL, "seconds": 0.6}
    with pytest.raises(EspalierError) as caught:
        design(**{**given, **changed})
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_smallest_network_that_is_told_can_be_had():
    with pytest.raises(BudgetError, match="takes 1,") as caught:
        design((1, 8, 8), 10, macs=1e6, params=500, layout=SMALL)
    least = float(str(caught.value).rpartition(" ")[2].replace(",", ""))
    found = design(
        (1, 8, 8), 10, macs=1e6, params=least, effectiveness=None, layout=SMALL, seconds=2
    )
    assert found.params == least


def test_without_the_solver_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ortools.sat.python", None)
    with pytest.raises(MissingExtra, match=r"espalier\[compress\]"):
        design((1, 8, 8), 10, **LIMITS, layout=SMALL, seconds=2)
