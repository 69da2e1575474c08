"""Training and scoring happen on the device that the network is on: needs a GPU."""

from __future__ import annotations

import pytest
import torch

import espalier as esp
from espalier import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_a_network_is_trained_and_evaluated_on_its_gpu() -> None:
    task = esp.tasks.images("digits", train=256, validation=128, test=128)
    family = esp.nets.make("resnet", task.shape, task.classes)
    network = family.build(family.space.decode(family.space.corner(last=False))[0]).cuda()
    history = train.fit(network, task, esp.Recipe(epochs=4, batch=32), 0)
    assert history[-1]["loss"] < history[0]["loss"]
    assert all(p.is_cuda for p in network.parameters())
    assert train.evaluate(network, task, "validation")["accuracy"] > 0.3


def test_a_supernet_is_trained_and_scored_on_its_gpu() -> None:
    task = esp.tasks.images("digits", train=256, validation=128, test=128)
    family = esp.nets.make("resnet", task.shape, task.classes)
    assert isinstance(family, esp.Supernet)
    family.cuda()
    train.train_supernet(family, task, esp.Recipe(epochs=4, batch=32), 0)
    some = family.space.decode(family.space.corner(last=True))
    scored = esp.estimators.OneShot(family, task, calibration_images=128).estimate(some)
    assert float(scored["accuracy"][0]) > 0.3
