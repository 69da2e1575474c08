"""Blocks and branches that can be left out: what is found, and that it computes what it should."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress_toys import IMAGES, TOKENS, Language, ViT, dense, resnet
from espalier.compress import Depth
from espalier.errors import EspalierError


def bound(model: nn.Module, example: Tensor = IMAGES):
    return Depth().bind(model.eval(), example)


def without(model: nn.Module, *names: str, example: Tensor = IMAGES) -> nn.Module:
    cut = bound(model, example)
    twin = copy.deepcopy(model)
    cut.apply(twin, {d.name: int(d.name not in names) for d in cut.decisions})
    return twin


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def test_residual_blocks_of_equal_shape_become_identities():
    model, x = resnet(), noise(3, 1, 8, 8)
    assert [d.name for d in bound(model).decisions] == ["depth:4", "depth:5", "depth:6"]
    small = without(model, "depth:4", "depth:6")
    assert type(small[4]) is nn.Identity
    expected = nn.Sequential(*model[:4], model[5], *model[7:])
    assert torch.equal(small(x), expected(x))


def test_a_branch_beside_a_projection_adds_nothing():
    model, x = resnet(), noise(3, 1, 8, 8)
    small = without(model, "depth:5")
    before = model[:5](x)
    expected = model[6:](F.relu(model[5].down(before)))
    assert torch.allclose(small(x), expected, atol=1e-6)
    assert not any(True for _ in small[5].conv2.parameters())
    assert any(True for _ in small[5].down.parameters())


def test_additions_in_place_and_a_relu_used_twice():
    model, x = resnet(in_place=True), noise(3, 1, 8, 8)
    cut = bound(model)
    assert [d.name for d in cut.decisions] == ["depth:4", "depth:6"]
    assert [(i.layer, "does not run" in i.reason) for i in cut.ignored] == [("5", True)]
    small = without(model, "depth:4")
    assert torch.equal(small(x), nn.Sequential(*model[:4], *model[5:])(x))


def test_attention_and_feed_forward_are_left_out_one_by_one():
    torch.manual_seed(0)
    model, x = ViT().eval(), noise(3, 1, 8, 8)
    names = [d.name for d in bound(model).decisions]
    assert names == [f"depth:layers.{i}.{part}" for i in range(2) for part in ("attn", "mlp")]
    small = without(model, "depth:layers.0.attn", "depth:layers.1.mlp")
    expected = copy.deepcopy(model)
    nn.init.zeros_(expected.layers[0].scale.gamma)
    nn.init.zeros_(expected.layers[1].mlp[2].weight)
    nn.init.zeros_(expected.layers[1].mlp[2].bias)
    assert torch.allclose(small(x), expected(x), atol=1e-6)
    kept = {n for n, _ in small.named_parameters() if n.startswith("layers.0")}
    assert kept == {
        f"layers.0.{n}.{w}" for n in ("norm2", "mlp.0", "mlp.2") for w in ("weight", "bias")
    }


def test_a_module_that_gives_a_tuple_keeps_giving_one():
    torch.manual_seed(0)
    model = Language().eval()
    small = without(model, "depth:attention", example=TOKENS)
    x = model.embedding(TOKENS)
    assert torch.allclose(small(TOKENS), model.head(x + model.mlp(x)), atol=1e-6)
    assert type(small.attention).__module__.startswith("torch.fx")


def test_layers_of_equal_shape_outside_of_blocks():
    model, x = dense().eval(), noise(3, 1, 8, 8)
    assert [d.name for d in bound(model).decisions] == ["depth:2.conv", "depth:4", "depth:8"]
    small = without(model, "depth:4", "depth:8")
    assert torch.equal(small(x), nn.Sequential(*model[:4], *model[5:8], *model[9:])(x))


def test_layers_and_slices_say_what_runs():
    cut = bound(resnet())
    assert cut.layers()["5.conv1"] == ("depth:5",)
    assert "5.down.0" not in cut.layers()
    conv = nn.Conv2d(1, 1, 1)
    assert cut.slice("5.conv1", conv, {"depth:5": 1}) is conv
    assert cut.slice("5.conv1", conv, {"depth:5": 0}) is None


def test_patterns_choose_and_wrong_ones_are_refused():
    cut = Depth(layers=["4", "6*"]).bind(resnet(), IMAGES)
    assert [d.name for d in cut.decisions] == ["depth:4", "depth:6"]
    with pytest.raises(EspalierError, match=r"matches no block .* there are: 4, 5, 6"):
        Depth(layers=["stage*"]).bind(resnet(), IMAGES)
    with pytest.raises(EspalierError, match="does not run on an example of shape"):
        Depth().bind(resnet(), torch.zeros(1, 3, 8, 8))


class Parallel(nn.Module):
    """RepVGG's block: branches without activation, which a method folds into one convolution."""

    def __init__(self, into: int, width: int) -> None:
        super().__init__()
        self.wide = nn.Sequential(nn.Conv2d(into, width, 3, padding=1), nn.BatchNorm2d(width))
        self.narrow = nn.Sequential(nn.Conv2d(into, width, 1), nn.BatchNorm2d(width))
        self.same = nn.BatchNorm2d(width) if into == width else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.wide(x) + self.narrow(x)
        return F.relu(y if self.same is None else y + self.same(x))


class Foldable(Parallel):
    def switch_to_deploy(self) -> None:
        raise NotImplementedError


class Fusable(nn.Module):
    """A residual block whose norms can be folded into its convolutions: its branch stays one."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.two(F.relu(self.one(x))))

    def fuse(self) -> None:
        raise NotImplementedError


def test_branches_that_fold_into_one_layer_are_no_decisions():
    model = nn.Sequential(Foldable(1, 8), Foldable(8, 8), Foldable(8, 8), nn.Flatten())
    cut = bound(model)
    assert [d.name for d in cut.decisions] == ["depth:1", "depth:2"]
    reason = "its branches become one layer with its own switch_to_deploy(): call that first"
    assert [(i.layer, i.reason) for i in cut.ignored] == [(n, reason) for n in "012"]
    x = noise(2, 1, 8, 8)
    assert torch.equal(without(model, "depth:1")(x), nn.Sequential(*model[:1], *model[2:])(x))


class Beside(Fusable):
    """One of two branches has an activation: they are no one layer."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.two(F.relu(x)) + self.one(x))


def test_branches_without_such_a_method_and_with_activations_are_decisions():
    names = [d.name for d in bound(nn.Sequential(Parallel(1, 8), Parallel(8, 8))).decisions]
    assert names == ["depth:0", "depth:1.wide", "depth:1.narrow", "depth:1.same"]
    for block in (Fusable(), Beside()):
        cut = bound(nn.Sequential(nn.Conv2d(1, 8, 1), block))
        assert cut.decisions[0].name == "depth:1"
        assert not any("become one layer" in i.reason for i in cut.ignored)


class NormAct(nn.BatchNorm2d):
    """A norm that holds its activation as a child."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


def test_a_norm_with_its_activation_is_no_block():
    norms = [NormAct(8), nn.Sequential(nn.BatchNorm2d(8), nn.ReLU())]
    model = nn.Sequential(nn.Conv2d(1, 8, 1), *norms, nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU()))
    assert [d.name for d in bound(model).decisions] == ["depth:3"]
