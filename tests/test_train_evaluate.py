"""Evaluation, batch-norm statistics, and fast gradients of depthwise convolutions."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from espalier import tasks, train
from espalier.train.depthwise import FastDepthwise


@pytest.fixture(scope="module")
def few():
    return tasks.make("digits:train=200,validation=100,test=100")


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 10)
    )


def test_evaluate_is_the_share_of_right_answers(few):
    net = network().eval()
    x, y = next(few.batches("test", 100))
    with torch.no_grad():
        outputs = net(x)
    got = train.evaluate(net, few, "test", batch=7)
    assert got["accuracy"] == pytest.approx(float((outputs.argmax(1) == y).float().mean()))
    assert got["loss"] == pytest.approx(float(functional.cross_entropy(outputs, y)), rel=1e-4)


def test_evaluate_puts_modes_back_and_changes_nothing(few):
    net = network().train()
    net[2].eval()
    before = [t.clone() for t in net.state_dict().values()]
    assert train.evaluate(net, few, "test") == train.evaluate(net, few, "test")
    assert [m.training for m in net] == [True, True, False, True, True]
    assert all(torch.equal(a, b) for a, b in zip(before, net.state_dict().values(), strict=True))


def test_statistics_are_the_average_over_the_batches():
    net = network().train()
    net[1].running_mean.fill_(100)
    inputs = [torch.randn(20, 1, 8, 8), torch.randn(20, 1, 8, 8) * 3]
    train.set_statistics(net, inputs)
    seen = [net[0](x) for x in inputs]
    mean = torch.stack([s.mean((0, 2, 3)) for s in seen]).mean(0)
    var = torch.stack([s.var((0, 2, 3)) for s in seen]).mean(0)
    assert torch.allclose(net[1].running_mean, mean, atol=1e-5)
    assert torch.allclose(net[1].running_var, var, atol=1e-5)
    assert net[1].momentum == 0.1
    assert net.training
    assert net[1].training


def test_statistics_do_not_see_dropout():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm2d(1)).train()
    train.set_statistics(net, [torch.ones(9, 1, 8, 8)])
    assert float(net[1].running_mean) == 1.0


def test_recalibrate_is_a_function_of_its_seed(few):
    nets = [network() for _ in range(3)]
    for net, seed in zip(nets, (1, 1, 2), strict=True):
        train.recalibrate(net, few, batches=1, batch=64, seed=seed)
    assert torch.equal(nets[0][1].running_mean, nets[1][1].running_mean)
    assert not torch.equal(nets[0][1].running_mean, nets[2][1].running_mean)


def gradients(x, weight, bias, stride, padding, fast):
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    layer = nn.Conv2d(
        len(weight), len(weight), weight.shape[-1], stride, padding, groups=len(weight)
    )
    layer.weight.data, layer.bias.data = weight.clone(), bias.clone()
    with torch.autocast("cpu", torch.bfloat16):
        if fast:
            with FastDepthwise():
                out = layer(leaves[0])
        else:
            out = layer(leaves[0])
    (out.float() * torch.linspace(0, 1, out.shape[-1])).sum().backward()
    return out.detach(), leaves[0].grad, layer.weight.grad, layer.bias.grad


@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("more", [0, -1])
def test_fast_depthwise_gradients_are_those_of_torch(kernel, stride, more):
    torch.manual_seed(kernel * 10 + stride)
    x = torch.randn(3, 6, 11, 9).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(6, 1, kernel, kernel), torch.randn(6)
    padding = kernel // 2 + more
    slow = gradients(x, weight, bias, stride, padding, fast=False)
    fast = gradients(x, weight, bias, stride, padding, fast=True)
    for a, b in zip(slow, fast, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert torch.allclose(a.float(), b.float(), rtol=0.02, atol=0.02 * float(a.abs().max()))


def test_fast_depthwise_leaves_other_convolutions_alone():
    x, weight = torch.randn(2, 4, 8, 8), torch.randn(4, 4, 5, 5, requires_grad=True)
    with FastDepthwise():
        dense = functional.conv2d(x, weight, None, (1, 1), (2, 2), (1, 1), 1)
        dilated = functional.conv2d(x, weight[:, :1], None, (1, 1), (2, 2), (2, 2), 4)
        wide = functional.conv2d(x, weight[:, :1, :3], None, (1, 1), (1, 2), (1, 1), 4)
        fast = functional.conv2d(x, weight[:, :1], None, (1, 1), (2, 2), (1, 1), 4)
    assert "Depthwise" not in "".join(t.grad_fn.name() for t in (dense, dilated, wide))
    assert "Depthwise" in fast.grad_fn.name()
