"""Rank correlation of one-shot estimates with the truth, against a count of pairs by hand."""

from itertools import combinations

import numpy as np
import pytest
import torch

from espalier import nets, tasks
from espalier.errors import EspalierError, SpaceError
from espalier.estimators import Estimator, Trained, rank_check
from espalier.problem import Metrics
from espalier.train import Recipe


@pytest.fixture(scope="module")
def task():
    return tasks.make("digits:train=64,validation=60,test=50")


@pytest.fixture(scope="module")
def supernet(task):
    torch.manual_seed(0)
    return nets.MobileNet(
        task.shape, task.classes, stem=4, widths=[8, 8, 8], depth=1, kernel=3, expansion=(1, 2), head=(8, 16)
    )  # fmt: skip


class Told(Estimator):
    """Gives the numbers that it was given."""

    def __init__(self, task, values):
        self.metrics, self.values = task.metrics[:1], values

    def estimate(self, candidates):
        return Metrics({self.metrics[0].name: [self.values[c] for c in candidates]}, self.metrics)


def test_against_a_table(supernet, task):
    codes = supernet.space.enumerate()
    candidates = supernet.space.decode(codes)[:8]
    rng = np.random.default_rng(0)
    truth = dict(zip(candidates, rng.permutation(8).astype(float), strict=True))
    guess = {c: truth[c] + rng.normal(0, 2) for c in candidates}
    found = rank_check(supernet, task, candidates, truth, estimator=Told(task, guess))
    signs = [
        np.sign((truth[a] - truth[b]) * (guess[a] - guess[b]))
        for a, b in combinations(candidates, 2)
    ]
    assert found["kendall"] == pytest.approx(np.mean(signs))
    low, high = found["kendall_95"]
    assert -1 <= low < found["kendall"] < high <= 1
    gaps = np.argsort(np.argsort(list(truth.values()))) - np.argsort(
        np.argsort(list(guess.values()))
    )
    assert found["spearman"] == pytest.approx(1 - 6 * np.square(gaps).sum() / (8 * 63))
    assert found["n"] == 8
    assert found["metric"] == task.metrics[0].name
    perfect = rank_check(supernet, task, candidates, truth, estimator=Told(task, truth))
    assert [perfect["kendall"], perfect["spearman"]] == pytest.approx([1, 1])
    assert perfect["kendall_95"] == pytest.approx([1, 1])
    constant = rank_check(
        supernet, task, candidates, truth, estimator=Told(task, dict.fromkeys(candidates, 0.5))
    )
    assert constant["kendall"] is constant["spearman"] is constant["kendall_95"] is None


def test_against_networks_trained_alone(supernet, task):
    recipe = Recipe(epochs=1)
    found = rank_check(supernet, task, 3, recipe=recipe, seed=4)
    chosen = [supernet.space.candidate(c) for c in found["candidates"]]
    assert len(set(chosen)) == 3
    expected = Trained(supernet, task, recipe, 4).estimate(chosen)[found["metric"]]
    assert found["truth"] == expected.tolist()


def test_too_few_or_unknown(supernet, task):
    candidates = supernet.space.decode(supernet.space.enumerate())[:3]
    with pytest.raises(SpaceError, match="3 different candidates or more, got 1"):
        rank_check(supernet, task, [candidates[0]] * 5)
    told = Told(task, dict.fromkeys(candidates, 0.0))
    with pytest.raises(EspalierError, match="it has none for"):
        rank_check(supernet, task, candidates, {candidates[0]: 1.0}, estimator=told)
