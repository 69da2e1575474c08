"""Estimators: what the conformance suite asks, and that the numbers are what they are said to be."""

import numpy as np
import pytest
import torch

from espalier import nets, tasks, train
from espalier.estimators import Estimator, OneShot, Trained
from espalier.problem import Metric, Metrics
from espalier.testing.estimator import check_estimator
from espalier.train import Recipe
from espalier.train.seeds import mixed


@pytest.fixture(scope="module")
def task():
    return tasks.make("digits:train=300,validation=150,test=60")


@pytest.fixture(scope="module")
def supernet(task):
    torch.manual_seed(0)
    net = nets.MobileNet(
        task.shape,
        task.classes,
        stem=(4, 8),
        widths=[(8,), (8, 16), (12, 24)],
        depth=(1, 2),
        expansion=(1, 2),
        head=(16, 32),
    )
    train.train_supernet(net, task, Recipe(epochs=6, batch=64), seed=0)
    return net


def some(family, count=4):
    return family.space.decode(family.space.sample(count, np.random.default_rng(1)))


def test_one_shot_conforms(supernet, task):
    check_estimator(OneShot(supernet, task, calibration_images=128), some(supernet))


def test_trained_conforms(supernet, task):
    check_estimator(Trained(supernet, task, Recipe(epochs=1)), some(supernet, 2))


def test_one_shot_is_the_extracted_network_with_statistics_set(supernet, task):
    estimator = OneShot(supernet, task, seed=3, calibration_images=128, precision="fp32")
    for candidate in some(supernet):
        network = supernet.extract(candidate)
        train.recalibrate(network, task, batches=1, batch=128, seed=3)
        expected = train.evaluate(network, task, "validation")
        got = estimator.estimate([candidate])
        assert got["accuracy"][0] == pytest.approx(expected["accuracy"], abs=0.01)
        assert got["loss"][0] == pytest.approx(expected["loss"], rel=1e-3)


def test_one_shot_leaves_the_supernet_as_it_was(supernet, task):
    candidates = some(supernet)
    supernet.activate(candidates[0])
    supernet.train()
    before = {k: v.clone() for k, v in supernet.state_dict().items()}
    OneShot(supernet, task).estimate(candidates[1:])
    assert supernet.active == candidates[0]
    assert supernet.training
    assert all(torch.equal(before[k], v) for k, v in supernet.state_dict().items())


def test_one_shot_reads_a_subset_where_the_split_is_larger(supernet, task):
    whole, part = OneShot(supernet, task), OneShot(supernet, task, images=40)
    assert len(whole._loaded()[2]) == 150
    assert len(part._loaded()[2]) == 40
    check_estimator(part, some(supernet, 2))


def test_scores_say_how_they_were_obtained(supernet, task):
    for estimator in (OneShot(supernet, task), Trained(supernet, task, Recipe(epochs=1))):
        about = {m.name: m for m in estimator.metrics}
        assert about["accuracy"] == Metric("accuracy", "", "max", "estimated", "validation")
        assert about["loss"].goal == "min"


def test_trained_does_what_fit_does(supernet, task):
    candidate = some(supernet, 1)[0]
    recipe, own = Recipe(epochs=2), mixed(5, int(candidate.id, 16))
    got = Trained(supernet, task, recipe, seed=5, split="test").estimate([candidate])
    torch.manual_seed(own)
    torch.manual_seed(mixed(own))
    network = supernet.build(candidate)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train.fit(network, task, recipe, own)
    expected = train.evaluate(network, task, "test")
    torch.set_num_threads(threads)
    assert got["accuracy"][0] == expected["accuracy"]


def test_the_number_of_threads_is_put_back(supernet, task):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        OneShot(supernet, task).estimate(some(supernet, 1))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


class Toy(Estimator):
    """Scores by width; `fault` breaks one rule."""

    metrics = (Metric("accuracy", goal="max", how="estimated"),)

    def __init__(self, fault=""):
        self.fault, self.calls = fault, 0

    def estimate(self, candidates):
        self.calls += 1
        values = [float(c["head.width"]) for c in candidates]
        if self.fault == "batch":
            values = [v / len(values) for v in values]
        if self.fault == "order":
            values = [v + i for i, v in enumerate(values)]
        if self.fault == "noise":
            values = [v + self.calls for v in values]
        if self.fault == "nan":
            values[0] = np.nan
        name = "loss" if self.fault == "columns" else "accuracy"
        about = [Metric(name, goal="max", how="estimated")]
        return Metrics({name: values[1:] if self.fault == "rows" else values}, about)


def test_the_suite_passes_what_keeps_the_rules(supernet):
    check_estimator(Toy(), some(supernet))


@pytest.mark.parametrize("fault", ["batch", "order", "noise", "nan", "columns", "rows"])
def test_the_suite_finds_each_fault(supernet, fault):
    with pytest.raises(AssertionError):
        check_estimator(Toy(fault), some(supernet))
