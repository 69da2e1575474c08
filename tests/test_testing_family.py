"""The conformance suite of families finds what is wrong."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import espalier as esp
from espalier.nets import elastic
from espalier.testing.family import check_family


class Good(esp.Family):
    shape, classes = (1, 4, 4), 3
    space = esp.Space([esp.ordinal("width", 4, 8)])

    def build(self, candidate):
        width = candidate["width"]
        return nn.Sequential(
            nn.Conv2d(1, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3)
        )


class Wide(Good):
    classes = 4


class Unseeded(Good):
    def build(self, candidate):
        network = super().build(candidate)
        fresh = torch.Generator()
        fresh.seed()
        nn.init.normal_(network[0].weight, generator=fresh)
        return network


class Constant(Good):
    def build(self, candidate):
        network = super().build(candidate)
        for parameter in network.parameters():
            nn.init.constant_(parameter, 0.1)
        return network


class Elastic(Good):
    def build(self, candidate):
        return nn.Sequential(
            elastic.Conv2d(1, 4), *super().build({"width": 4})[1:3], nn.Linear(4, 3)
        )


class Infinite(Good):
    def build(self, candidate):
        network = super().build(candidate)
        nn.init.constant_(network[-1].bias, float("inf"))
        return network


class Frozen(Good):
    def build(self, candidate):
        return super().build(candidate).requires_grad_(False)


class Shared(esp.Supernet):
    """Right, as a base for supernets that are not."""

    def __init__(self):
        super().__init__((1, 4, 4), 3)
        width = esp.ordinal("width", 4, 8)
        self.body = elastic.Conv2d(1, width)
        self.tail = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), elastic.Linear(width, 3))


class Other(Shared):
    def extract(self, candidate=None):
        network = super().extract(candidate)
        with torch.no_grad():
            network.body.weight[0, 0, 0, 0] += 0.01
        return network


class Draws(Shared):
    def extract(self, candidate=None):
        torch.rand(1)
        return super().extract(candidate)


class Switches(Shared):
    def extract(self, candidate=None):
        self.activate(self.uniform(0))
        return super().extract(candidate)


class Halves(Shared):
    def units(self):
        return super().units()[:1]


class Vague(Shared):
    def units(self):
        return [esp.nets.Unit(unit.name, ()) for unit in super().units()]


def test_what_is_right_passes():
    check_family(Good())
    check_family(Shared())


@pytest.mark.parametrize(
    ("family", "finding"),
    [
        (Wide, "the output is"),
        (Unseeded, "one seed gives two networks"),
        (Constant, "the seed changes no weight"),
        (Elastic, "is a Conv2d of Espalier"),
        (Infinite, "not finite"),
        (Frozen, "no weight can learn"),
        (Other, "active differ by"),
        (Draws, "random numbers"),
        (Switches, "changes what is active"),
        (Halves, "parameters, the network"),
        (Vague, "for equal decisions"),
    ],
)
def test_what_is_wrong_is_found(family, finding):
    with pytest.raises(AssertionError, match=finding):
        check_family(family())
