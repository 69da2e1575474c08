"""The few-label protocol: who is held out, who is labelled, and what tau is of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import kendalltau

from bench_toys import toy
from espalier.bench.labels import ahead, split, tau
from espalier.errors import EspalierError

TABLE = toy()


class Listening:
    """Predicts the sum of the codes; keeps what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, Any, int]] = []

    def fit(self, x: Any, y: Any, seed: int = 0) -> None:
        self.told.append((x, y, seed))

    def predict(self, x: Any) -> tuple[Any, Any]:
        return np.asarray(x, dtype=float).sum(1), np.zeros(len(x))


def test_labelled_and_held_out_never_meet() -> None:
    labelled, held = split(TABLE, 3, 40, held=100)
    assert len(set(labelled)) == 40
    assert len(set(held)) == 100
    assert not set(labelled) & set(held)
    assert np.array_equal(split(TABLE, 4, 20, held=100)[1], held)  # held out once for all
    assert np.array_equal(split(TABLE, 3, 10, held=100)[0], labelled[:10])
    assert not np.array_equal(split(TABLE, 4, 40, held=100)[0], labelled)
    assert len(split(TABLE, 0, 128)[1]) == 128  # half of a small table
    with pytest.raises(EspalierError, match="156 rows to label beside the 100"):
        split(TABLE, 0, 157, held=100)


def test_tau_is_of_rows_held_out_and_of_both_columns() -> None:
    learner = Listening()
    found = tau(TABLE, lambda seed: learner, 20, [0, 1], held=100)
    assert [seed for *_, seed in learner.told] == [0, 1]
    for seed, (x, y, _) in enumerate(learner.told):
        labelled, held = split(TABLE, seed, 20, held=100)
        assert np.array_equal(x, TABLE.codes[labelled])
        assert np.array_equal(y, TABLE.columns["val_acc"][labelled])  # test is never told
        score = TABLE.codes[held].astype(float).sum(1)
        for role, column in (("validation", "val_acc"), ("test", "test_acc")):
            truth = kendalltau(score, TABLE.columns[column][held]).statistic
            assert found[role][seed] == pytest.approx(truth)


def test_ahead_by_hand() -> None:
    found = ahead(np.array([3.0, 4.0, 6.0]), np.array([1.0, 1.0, 2.0]))
    assert found["gap"] == pytest.approx(3.0)
    assert found["standard_error"] == pytest.approx(1 / np.sqrt(3))
    assert found["holds"] is True
    assert ahead(np.array([1.0, -1.0]), np.zeros(2))["holds"] is False
    assert ahead(np.array([1.0]), np.zeros(1))["holds"] is False  # one draw shows nothing
