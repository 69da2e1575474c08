"""EEEA-Net's recipe on the real table: the threshold does what it says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from espalier.bench import tables
from espalier.recipes import eeea_net


@pytest.mark.data
def test_the_threshold_makes_the_start_cheap(real_data: Path) -> None:
    problem = eeea_net._Problem(tables.load("nb_macro"))
    assert problem.cap == np.percentile(problem.params, 30)
    found = eeea_net._compared(problem, range(3), 100, 50, limited=False)
    # half of the rows are drawn, below the 30th percentile or anywhere
    assert 0.2 < found["params_saved"] < 0.6
    assert 0 <= found["wins"] <= 3
    assert all(0.4 < v < 0.62 for v in found["hypervolume"].values())
