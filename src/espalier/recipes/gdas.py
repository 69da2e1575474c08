"""GDAS: one operator an edge is drawn and run, with a gradient by Gumbel-softmax."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from espalier.recipes import Recipe
from espalier.recipes._parts.nb201 import ABOUT, DERIVED, SCALES, Method, compared, lower, searched
from espalier.recipes.darts import DARTS
from espalier.solvers.relax import FirstOrder, Gumbel
from espalier.train.schedules import linear

GDAS = Method(
    "gdas",
    lambda setting: {
        "relaxation": Gumbel(temperature=linear(10.0, 0.1), hard=True),
        "rule": FirstOrder(),
        "selection": DERIVED,
    },
)


def run(scale: str, seed: int, out: Path | None) -> dict[str, Any]:
    """The cell beside that of DARTS and that of random search of the same time."""
    setting = SCALES[scale]
    found = {m.name: searched(m, setting, seed, out) for m in (GDAS, DARTS)}
    check = compared(found, "gdas", setting, seed, out)
    ahead = lower(check["test"]["darts"], check["test"]["gdas"])
    return {
        "searches": found,
        "check": {
            **check,
            "time_of_darts": found["gdas"]["seconds"] / found["darts"]["seconds"],
            "memory_of_darts": found["gdas"]["bytes_kept"] / found["darts"]["bytes_kept"],
            "above_darts": ahead,
            "holds": ahead,
        },
    }


RECIPE = Recipe(
    name="gdas",
    title="GDAS: one sampled operator an edge",
    source="Dong & Yang, Searching for a Robust Neural Architecture in Four GPU Hours, CVPR 2019 "
    "(https://arxiv.org/abs/1910.04465)",
    parts=(
        "space: NAS-Bench-201's cells, in a supernet that shares weights",
        "relaxation: hard Gumbel-softmax, the temperature falling from 10 to 0.1",
        "rule: first order",
        "selection: the likeliest operator of each edge",
        "baselines: DARTS with the same seed, random search of the same time",
    ),
    works_when="The cell found is better on the table than that of DARTS with the same seed.",
    run=run,
    text=f"""
One operator of each edge is drawn and run, so a step costs about one cell; the gradient is that of
the soft sample at the operator that ran. Not a row of the catalogue: a second baseline, beside DARTS.
{ABOUT}
""",
)
