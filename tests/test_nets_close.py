"""CLOSENet: edges take weights from blocks, blocks grow, and what comes out is NB201's network."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from espalier import train
from espalier.errors import SpaceError
from espalier.nets.close import CLOSENet
from espalier.nets.nb201 import EDGES, NB201, SPACE
from espalier.testing.family import check_family


def made(blocks=3, grown=3, seed=0, **options):
    torch.manual_seed(seed)
    net = CLOSENet((3, 8, 8), 4, **{"channels": 4, "cells": 1, "blocks": blocks, **options})
    for _ in range(grown - 1):
        net.grow()
    with torch.no_grad():  # blocks that are copies would hide a wrong assignment
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return net


def some(n, seed=0):
    return list(SPACE.decode(SPACE.sample(n, np.random.default_rng(seed))))


def assigned(net, candidate):
    return net.gate.assign([candidate[name] for name in SPACE.names], False)[0]


def test_it_is_a_family():
    check_family(made())


def test_space_and_networks_are_those_of_nas_bench_201():
    net, plain = made(), NB201((3, 8, 8), 4, channels=4, cells=1)
    assert net.space == SPACE
    for candidate in some(6):
        sizes = [
            {name: tuple(t.shape) for name, t in network.state_dict().items()}
            for network in (net.extract(candidate), plain.build(candidate))
        ]
        assert sizes[0] == sizes[1]


def test_an_edge_computes_with_the_weights_of_its_block():
    net = made()
    all3 = dict.fromkeys(SPACE.names, "nor_conv_3x3")
    net.activate(all3)
    blocks = assigned(net, all3)
    found = net.extract(all3)
    for (to, origin), block in zip(EDGES, blocks, strict=True):
        edge = found.get_submodule(f"stage2.0.op_{to}_{origin}")
        held = net.stage2[0].blocks[block]
        assert torch.equal(edge.conv.weight, held.weight["nor_conv_3x3"])
        assert torch.equal(edge.norm.weight, held.scale["nor_conv_3x3"])
    # without the gate's noise, training computes what the plain network computes
    net.gate.assign = lambda chosen, drawn: (blocks, None)
    x = torch.randn(6, 3, 8, 8)
    assert torch.allclose(net.train()(x), found.train()(x), atol=1e-5)


def test_edges_that_share_a_block_share_its_gradient():
    """Against the plain network: the block's gradient is the sum over its edges."""
    net = made(blocks=1, grown=1)
    candidate = {**dict.fromkeys(SPACE.names, "nor_conv_1x1"), "op_3_0": "nor_conv_3x3"}
    plain = net.train().extract(candidate)
    net.activate(candidate)
    x, y = torch.randn(5, 3, 8, 8), torch.tensor([0, 1, 2, 3, 0])
    for network in (net, plain):
        F.cross_entropy(network(x), y).backward()
    edges = [f"stage1.0.op_{to}_{o}.conv" for to, o in EDGES if (to, o) != (3, 0)]
    total = sum(plain.get_submodule(edge).weight.grad for edge in edges)
    held = net.stage1[0].blocks[0]
    assert torch.allclose(held.weight["nor_conv_1x1"].grad, total, atol=1e-5)
    alone = plain.get_submodule("stage1.0.op_3_0.conv").weight.grad
    assert torch.allclose(held.weight["nor_conv_3x3"].grad, alone, atol=1e-5)


def test_a_new_block_starts_as_the_last_and_computes_the_same():
    net = made(grown=1).eval()
    candidate = some(1)[0]
    net.activate(candidate)
    x = torch.randn(4, 3, 8, 8)
    before = net(x)
    net.grow()
    assert net.blocks == 2
    for cell in (net.stage1[0], net.stage3[0]):
        one, two = (cell.blocks[i].state_dict() for i in (0, 1))
        assert all(torch.equal(one[name], two[name]) for name in one)
        three = cell.blocks[2].state_dict()
        assert not torch.equal(three["weight.nor_conv_3x3"], two["weight.nor_conv_3x3"])
    assert torch.allclose(net(x), before, atol=1e-6)
    assert set(assigned(net, candidate)) == {0, 1}
    net.grow()
    with pytest.raises(SpaceError, match="3 blocks at most"):
        net.grow()
    fresh = CLOSENet((3, 8, 8), 4, channels=4, cells=1, blocks=3)
    fresh.load_state_dict(net.state_dict())
    assert fresh.blocks == 3


def test_the_gate_learns_with_the_weights_and_knows_the_cell():
    net = made().train()
    candidate = dict.fromkeys(SPACE.names, "nor_conv_3x3")
    net.activate(candidate)
    F.cross_entropy(net(torch.randn(8, 3, 8, 8)), torch.arange(8) % 4).backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in net.gate.parameters())
    logits = net.gate(list(candidate.values()))
    assert torch.allclose(logits.mean(0), torch.zeros(3), atol=1e-5)  # no block takes all edges
    assert torch.allclose(logits.std(0), net.gate.gain.expand(3), atol=1e-3)
    other = net.gate([*list(candidate.values())[:-1], "none"])
    assert not torch.allclose(logits[5], other[5])  # so do cells


def test_statistics_of_edges_with_one_block_are_their_own():
    net = made(blocks=1, grown=1)
    candidate = dict.fromkeys(SPACE.names, "nor_conv_3x3")
    net.activate(candidate)
    x = torch.randn(64, 3, 8, 8)
    train.set_statistics(net, [x])
    exact = net.extract(candidate).train()(x)  # batch statistics are what was set, but for n - 1
    assert torch.allclose(net.eval()(x), exact, atol=2e-2)
    means = [net.stage1[0].norms[i]["nor_conv_3x3"].running_mean for i in (0, 5)]
    assert not torch.allclose(*means)


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(SpaceError, match="blocks of a CLOSENet is a whole number from 1, got 0"):
        CLOSENet((3, 8, 8), 4, blocks=0)
    with pytest.raises(SpaceError, match="temperature"):
        CLOSENet((3, 8, 8), 4, temperature=0.0)
