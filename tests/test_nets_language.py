"""The language of networks: what an expression leaves open, and the networks it denotes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from espalier.errors import SpaceError
from espalier.nets.language import (
    Concat,
    Conv,
    Dropout,
    Language,
    Module,
    Optional,
    Or,
    Pool,
    Repeat,
    Residual,
)
from espalier.recipes.deep_architect import expression, searched
from espalier.space import ordinal
from espalier.testing.family import check_family

SHAPE = (2, 6, 5)


def family(part: Module) -> Language:
    return Language(part, SHAPE, 3)


def layers(network: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(m, kind) for m in network.modules())


def test_an_expression_denotes_as_many_networks_as_counted_by_hand() -> None:
    conv = Conv((4, 8), kernel=(1, 3, 5))  # 6
    assert family(conv).space.size == 6
    assert family(Concat(conv, conv)).space.size == 36
    assert family(Or(conv, Pool(("max", "mean")), Conv(4))).space.size == 6 + 2 + 1
    assert family(Optional(conv)).space.size == 1 + 6
    assert family(Repeat(conv, (0, 1, 3))).space.size == 1 + 6 + 6**3
    assert family(Repeat(conv, (0, 1, 3), tied=True)).space.size == 1 + 6 + 6
    nested = Repeat(Or(Optional(conv), Residual(conv)), (1, 2))
    assert family(nested).space.size == 13 + 13**2
    assert family(Concat(conv, Dropout((0.1, 0.2)))).space.size == 12
    assert Language(conv, SHAPE, 3, beside=[ordinal("lr", 0.1, 0.2)]).space.size == 12
    assert expression().space.size > 10**6


def test_the_network_is_what_the_candidate_says() -> None:
    written = family(Concat(Repeat(Or(Conv(4), Residual(Conv((2, 6)))), (0, 1, 2)), Pool("max")))
    two = written.space.candidate(
        {"net.0.times": 2, "net.0.0.or": 0, "net.0.1.or": 1, "net.0.1.1.0.filters": 6}
    )
    network = written.build(two)
    convs = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    # the shortcut needs a 1x1, for 4 channels become 6
    assert [(m.in_channels, m.out_channels, m.kernel_size[0]) for m in convs] == [
        (2, 4, 3),
        (4, 6, 3),
        (4, 6, 1),
    ]
    none = written.build(written.space.candidate({"net.0.times": 0}))
    assert layers(none, nn.Conv2d) == 0
    assert layers(none, nn.MaxPool2d) == 1


def test_a_residual_adds_its_input() -> None:
    written = family(Residual(Conv(2)))
    network = written.build(written.space.candidate({})).eval()
    x = torch.randn(4, *SHAPE)
    conv, norm = network.get_submodule("net.0.conv"), network.get_submodule("net.0.norm")
    inside = torch.relu(norm(conv(x))) + x
    expected = network.get_submodule("head.linear")(inside.mean((2, 3)))
    assert torch.allclose(network(x), expected, atol=1e-6)
    with pytest.raises(SpaceError, match="keeps the size"):
        family(Residual(Pool("max"))).build(family(Residual(Pool("max"))).space.candidate({}))


def test_tied_repetitions_are_alike_and_have_their_own_weights() -> None:
    written = family(Repeat(Conv((4, 8), kernel=(1, 3)), (1, 2, 3), tied=True))
    chosen = {"net.times": 3, "net.0.filters": 8, "net.0.kernel": 1}
    network = written.build(written.space.candidate(chosen))
    shapes = [tuple(m.weight.shape) for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert shapes == [(8, 2, 1, 1), (8, 8, 1, 1), (8, 8, 1, 1)]


def test_it_is_a_family_and_every_leaf_compiles() -> None:
    check_family(expression())
    deep = family(
        Concat(
            Repeat(
                Concat(Optional(Residual(Conv((2, 4), separable=(False, True)))), Pool()), (1, 4)
            ),
            Or(Dropout(0.5), Conv(3)),
        )
    )
    for candidate in deep.space.decode(deep.space.sample(30, np.random.default_rng(0))):
        network = deep.build(candidate)
        assert network(deep.example(3)).shape == (3, 3)


def test_a_search_on_the_tree_trains_real_networks() -> None:
    curve, test = searched("mcts", 3, 1, 0)
    assert len(curve) == 3
    assert curve == sorted(curve)
    assert 0.0 < test <= 1.0
