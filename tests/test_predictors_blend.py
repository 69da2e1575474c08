"""A blend against the mean of places by hand, and through a file."""

from __future__ import annotations

import numpy as np
import pytest

from espalier.errors import DataError
from espalier.estimators.predictors.blend import Blend
from espalier.estimators.predictors.forest import ExtraTrees
from espalier.estimators.predictors.regressor import Refitted

RNG = np.random.default_rng(0)
X, MORE = RNG.random((40, 3)), RNG.random((100, 3))
Y = 100 * X[:, 0] + X[:, 1]


class Column(Refitted):
    """Predicts a column, stretched."""

    name = "column"

    def __init__(self, column: int, stretch: float) -> None:
        self.column, self.stretch = column, stretch
        self.__post_init__()

    def fit(self, x, y, seed=0):  # type: ignore[no-untyped-def]
        self._keep(x, y, seed)

    def predict(self, x):  # type: ignore[no-untyped-def]
        return np.exp(self.stretch * x[:, self.column]), np.zeros(len(x))

    def settings(self):  # type: ignore[no-untyped-def]
        return {}


def test_a_blend_is_the_mean_of_places() -> None:
    blend = Blend([(Column(0, 1.0), None), (Column(0, 30.0), lambda x: x[:, ::-1])], MORE)
    blend.fit(X, Y)
    mean, std = blend.predict(MORE)
    place = [np.argsort(np.argsort(MORE[:, k])) / (len(MORE) - 1) for k in (0, 2)]
    by_hand = (place[0] + place[1]) / 2
    assert np.corrcoef(mean, by_hand)[0, 1] == pytest.approx(1.0)
    slope = np.polyfit(by_hand, mean, 1)[0]
    assert slope > 0
    assert std == pytest.approx(slope * np.abs(place[0] - place[1]) / 2)
    one = blend.predict(MORE[7:8])[0]
    assert one == pytest.approx(mean[7:8])  # whatever else is in the batch


def test_it_predicts_in_the_unit_of_the_labels_and_survives_a_file() -> None:
    def make() -> Blend:
        return Blend([(ExtraTrees(), None), (Column(0, 1.0), None)], MORE)

    blend = make()
    with pytest.raises(DataError, match="fit first"):
        blend.predict(MORE)
    blend.fit(X, Y)
    truth = 100 * MORE[:, 0] + MORE[:, 1]
    assert np.abs(blend.predict(MORE)[0] - truth).mean() < 15
    again = make()
    again.restore(blend.arrays())
    assert np.array_equal(again.predict(MORE), blend.predict(MORE))
    with pytest.raises(DataError, match="at least one part"):
        Blend([], MORE)
