"""Parts of the recipes gates and dele."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench_toys import toy
from espalier.errors import DataError
from espalier.recipes.dele import PLANS, signals
from espalier.recipes.gates import queries_to_top

SMALL = replace(PLANS["smoke"], cells=6, measures=("params", "l2", "synflow"))


def test_queries_until_the_best_share() -> None:
    table = toy()
    order = np.argsort(-table.columns["val_acc"])
    rows = [int(i) for i in order[[200, 30, 3, 2, 0]]]
    assert queries_to_top(table, rows, share=4 / 256) == 3  # the best four rows count
    assert queries_to_top(table, rows, share=3 / 256) == 4
    assert queries_to_top(table, rows[:2], share=4 / 256) == 3  # never: one more than there are


def test_scores_are_kept_and_read_again(tmp_path: Path) -> None:
    codes, known = signals(SMALL, 0, tmp_path)
    again, stored = signals(SMALL, 0, tmp_path)
    assert np.array_equal(codes, again)
    assert codes.shape == (6, 6)
    for name in SMALL.measures:
        assert np.array_equal(known[name], stored[name], equal_nan=True)
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"damaged")
    with pytest.raises(DataError, match="delete it"):
        signals(SMALL, 0, tmp_path)
