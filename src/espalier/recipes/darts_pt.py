"""DARTS-PT: from the supernet of DARTS, each edge keeps the operator whose removal hurts most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier.recipes import Recipe
from espalier.recipes._parts.nb201 import (
    ABOUT,
    DERIVED,
    SCALES,
    Method,
    Setting,
    answer,
    compared,
    lower,
    searched,
)
from espalier.recipes.darts import DARTS
from espalier.solvers.relax import Perturbation, Settings

if TYPE_CHECKING:
    from espalier.solvers.relax import SelectionState
    from espalier.space import Candidate

_TUNE = 5  # epochs between edges, as published


@dataclass
class Both:
    """Perturbation, and on record what magnitude selects from the identical supernet."""

    setting: Setting
    perturbation: Perturbation = field(default_factory=lambda: Perturbation(tune_epochs=_TUNE))
    found: dict[str, Any] = field(default_factory=dict)

    def __call__(self, state: SelectionState) -> Candidate:
        by_magnitude = DERIVED(state)
        chosen: Candidate = self.perturbation(state)
        self.found = {
            "magnitude": answer(by_magnitude, self.setting),
            "steps": self.perturbation.log,
        }
        return chosen


def frozen(base: Settings) -> Settings:
    """The architecture is never learned: all operators alike to the end."""
    return replace(base, warmup_epochs=base.epochs)


def slots(setting: Setting) -> Mapping[str, Any]:
    """DARTS's, but for the selection."""
    return {**DARTS.slots(setting), "selection": Both(setting)}


PT = Method("darts-pt", slots)
FROZEN = Method("darts-pt-frozen", slots, settings=frozen)


def run(scale: str, seed: int, out: Path | None) -> dict[str, Any]:
    """Both selections from one supernet; and perturbation where the architecture was frozen."""
    setting = SCALES[scale]
    found = {m.name: searched(m, setting, seed, out) for m in (PT, FROZEN)}
    same = {"seconds": found["darts-pt"]["seconds"]}
    found["magnitude"] = {**found["darts-pt"]["selection"]["magnitude"], **same}
    check = compared(found, "darts-pt", setting, seed, out)
    ahead = lower(check["test"]["magnitude"], check["test"]["darts-pt"])
    return {"searches": found, "check": {**check, "above_magnitude": ahead, "holds": ahead}}


RECIPE = Recipe(
    name="darts-pt",
    title="DARTS-PT: selection by perturbation",
    source="Wang, Cheng, Chen, Tang & Hsieh, Rethinking Architecture Selection in Differentiable NAS, "
    "ICLR 2021 (https://arxiv.org/abs/2108.04392)",
    parts=(
        "space: NAS-Bench-201's cells, in a supernet that shares weights",
        "relaxation and rule: those of DARTS, and once with the architecture frozen",
        "selection: edge by edge in random order, the operator without which the supernet is worst on "
        "validation; the shared weights are tuned for five epochs between edges",
        "baselines: the likeliest operators of the identical supernet, random search of the same time",
    ),
    works_when="From the identical trained supernet the cell selected by perturbation is better on the "
    "table than the one selected by magnitude.",
    run=run,
    text=f"""
The supernet of DARTS is trained once; magnitude reads its architecture, perturbation its accuracy.
"Frozen" is the same with an architecture that never moves, where magnitude has nothing to read: the
published ablation, which came out better than learning it.
{ABOUT}
""",
)
