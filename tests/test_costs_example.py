"""The documented own cost: short, runs as a script, and conforms."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

import espalier as esp
from espalier.costs import count
from espalier.testing.cost import check_cost

EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "own_cost.py"


def test_it_is_short_and_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 30
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    energies = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(energies) == 3
    assert energies == sorted(energies)


def test_it_conforms_and_is_right() -> None:
    made = runpy.run_path(str(EXAMPLE))
    family = esp.nets.make("resnet", (1, 8, 8), 10)
    candidates = [family.uniform(scale) for scale in (0.0, 0.4, 1.0)]
    energy = made["Energy"](family)
    check_cost(energy, candidates)
    whole = count(family.build(candidates[1]), family.example())
    wanted = (4.6 * whole.macs + 160 * whole.bytes) * 1e-6
    assert energy.estimate(candidates)["energy_uj"][1] == pytest.approx(wanted)
