"""Harm of changes of a trained model, beside what torch gives by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from espalier.errors import EspalierError
from espalier.estimators import Calibrated
from espalier.nets import Family
from espalier.space import Candidate, Space, ordinal
from espalier.tasks import images
from espalier.testing import check_estimator


class Scaled(Family):
    """A small model whose last layer's weights are scaled."""

    name = "scaled"
    shape, classes = (1, 8, 8), 10
    space = Space([ordinal("scale", 0.0, 0.5, 1.0)])  # type: ignore[assignment]

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)
        ).eval()

    def build(self, candidate: Candidate) -> nn.Module:
        import copy

        network = copy.deepcopy(self.model)
        with torch.no_grad():
            network[-1].weight.mul_(float(candidate["scale"]))  # type: ignore[operator, union-attr]
        return network


@pytest.fixture(scope="module")
def task() -> object:
    return images("digits")


def by_hand(family: Scaled, x: torch.Tensor, scale: float, batch: bool) -> torch.Tensor:
    network = family.build(Candidate({"scale": scale}))
    network[1].train(batch)  # type: ignore[index]
    with torch.no_grad():
        return network(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("batch", [True, False])
def test_each_measure_is_what_torch_gives(task: object, batch: bool) -> None:
    family = Scaled()
    settings = {"images": 100, "recalibrate": batch, "seed": 3}
    scored = {
        m: Calibrated(family, task, measure=m, **settings)
        for m in ("loss", "divergence", "gradient")
    }  # type: ignore[arg-type]
    ((x, y),) = scored["loss"]._loaded()
    assert len(y) == scored["loss"].samples == 100
    before = by_hand(family, x, 1.0, False)
    candidates = [Candidate({"scale": s}) for s in (0.0, 0.5, 1.0)]
    for measure, estimator in scored.items():
        wanted = []
        for candidate in candidates:
            after = by_hand(family, x, float(candidate["scale"]), batch)
            p = before.softmax(1)
            slope = p - functional.one_hot(y, 10)
            wanted.append(
                {
                    "loss": functional.cross_entropy(after, y),
                    "divergence": (p * (p.log() - after.log_softmax(1))).sum(1).mean(),
                    "gradient": ((after - before) * slope).square().sum(1).mean(),
                }[measure].item()
            )
        assert estimator.harm(candidates) == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_divergence_is_a_mean_over_labels(task: object) -> None:
    """Of words, the classes last or in one row; a constant added to one place's changes nothing."""
    estimator = Calibrated(Scaled(), task, measure="divergence", images=4)  # type: ignore[arg-type]
    rng = torch.Generator().manual_seed(0)
    before, after = torch.randn(2, 3, 5, 7, generator=rng)
    targets, none = torch.zeros(3, 5, dtype=torch.long), torch.empty(0)
    p, q = before.log_softmax(-1), after.log_softmax(-1)
    wanted = (p.exp() * (p - q)).sum(-1).mean()
    shift = torch.zeros(3, 5, 1).index_fill(1, torch.tensor([2]), 9.0)
    for moved in (after, after + shift):
        for shape in ((3, 5, 7), (3, 35)):
            got = estimator._change(moved.reshape(shape), before.reshape(shape), none, targets)
            assert got == pytest.approx(wanted.item(), rel=1e-5)


def test_it_conforms_and_reads_train_only(task: object, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    batches = type(task).batches

    def seen(self: object, split: str, *a: object, **k: object) -> object:
        read.append(split)
        return batches(self, split, *a, **k)  # type: ignore[arg-type]

    monkeypatch.setattr(type(task), "batches", seen)
    family = Scaled()
    estimator = Calibrated(family, task, images=300)  # type: ignore[arg-type]
    check_estimator(estimator, [Candidate({"scale": s}) for s in (0.0, 1.0)])
    assert set(read) == {"train"}
    assert sum(len(y) for _, y in estimator._loaded()) == 300


def test_outputs_that_are_not_finite_are_infinite_harm(task: object) -> None:
    family = Scaled()
    estimator = Calibrated(family, task, images=20)  # type: ignore[arg-type]
    estimator.harm([Candidate({"scale": 1.0})])
    with torch.no_grad():
        family.model[-1].bias.fill_(float("nan"))  # type: ignore[operator, union-attr]
    assert np.isposinf(estimator.harm([Candidate({"scale": 1.0})])).all()


def test_settings_are_checked(task: object) -> None:
    with pytest.raises(EspalierError, match="Did you mean 'divergence'"):
        Calibrated(Scaled(), task, measure="divergences")  # type: ignore[arg-type]
    with pytest.raises(EspalierError, match="1 image or more"):
        Calibrated(Scaled(), task, images=0)  # type: ignore[arg-type]
