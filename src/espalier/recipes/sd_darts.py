"""SD-DARTS: the supernet learns from votes of its own snapshots, which flattens its loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from espalier.recipes import Recipe
from espalier.recipes._parts.nb201 import ABOUT, SCALES, Method, compared, lower, searched
from espalier.recipes.darts import DARTS
from espalier.solvers.relax import SelfDistillation

SD_DARTS = Method(
    "sd-darts", lambda setting: {**DARTS.slots(setting), "terms": (SelfDistillation(),)}
)


def run(scale: str, seed: int, out: Path | None) -> dict[str, Any]:
    """Sharpness, discretisation gap and cell, beside those of DARTS with as many steps."""
    setting = SCALES[scale]
    found = {m.name: searched(m, setting, seed, out) for m in (SD_DARTS, DARTS)}
    check = compared(found, "sd-darts", setting, seed, out)
    seen = {
        name: {"sharpness": m["sharpness"]["mean"], "gap": m["gap"]}
        for name, m in ((name, one["monitor"]) for name, one in found.items())
    }
    less = {what: seen["sd-darts"][what] < seen["darts"][what] for what in ("sharpness", "gap")}
    return {
        "searches": found,
        "check": {
            **check,
            **{what: {name: m[what] for name, m in seen.items()} for what in less},
            "flatter": less["sharpness"],
            "narrower": less["gap"],
            "above_darts": lower(check["test"]["darts"], check["test"]["sd-darts"]),
            "holds": all(less.values()),
        },
    }


RECIPE = Recipe(
    name="sd-darts",
    title="SD-DARTS: self-distillation from voted snapshots",
    source="Zhu et al., Improving Differentiable Architecture Search via Self-Distillation, 2023 "
    "(https://arxiv.org/abs/2302.05629)",
    parts=(
        "space: NAS-Bench-201's cells, in a supernet that shares weights",
        "relaxation, rule and selection: those of DARTS",
        "term: on weight steps the divergence from the vote of the last three epochs' supernets",
        "baselines: DARTS with the same seed and steps, random search of the same time",
    ),
    works_when="At equal steps and with the same seed, both the sharpness of the supernet (rise of the "
    "loss under noise of a tenth of each weight's norm) and the accuracy it loses when it becomes one "
    "network are lower than DARTS's.",
    run=run,
    text=f"""
Steps are equal, time is not: three teachers run beside each weight step. The gap is the accuracy on
validation of the mixture less that of the cell selected, with the same shared weights and statistics
set anew for each.
{ABOUT}
""",
)
