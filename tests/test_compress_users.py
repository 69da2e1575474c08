"""Layers and blocks as model zoos and users write them: cut, taken to pieces, exported."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress_toys import trained
from espalier.compress import Depth, Pretrained, Widths
from espalier.compress.calls import follow
from espalier.compress.cut import Ignored
from espalier.costs import Counts, count
from espalier.costs.pieces import pieces_of
from espalier.export import to_onnx

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class ChannelsFirst(nn.LayerNorm):
    """A norm over the channels of images: it turns what it takes, and turns it back."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(
            x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps
        )
        return x.permute(0, 3, 1, 2)


class NormAct(nn.BatchNorm2d):
    """A norm with its activation, in a subclass."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class Holding(nn.BatchNorm2d):
    """A norm that holds its activation as a module and computes without torch's own forward."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.drop, self.act = nn.Identity(), nn.Hardswish()

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)
        return self.act(self.drop(x))


class Scale(nn.Module):
    """A scale for each channel that keeps the shape in which it meets images."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shape = (width, 1, 1)
        self.scale = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.view(self.shape)


class Inverted(nn.Module):
    """ConvNeXt's block: depthwise, then two linear layers on channels that come last."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.down(F.gelu(self.up(y))) * self.gamma
        return x + y.permute(0, 3, 1, 2)


class Squeeze(nn.Module):
    """Squeeze and excite: a gate for each channel, from means over places."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(width, inner, 1), nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True))))
        return x * gate.sigmoid()


class Shuffled(nn.Module):
    """ShuffleNet's unit: one half passes, the other is convolved, then both are shuffled."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.one, self.two = nn.Conv2d(half, half, 1), nn.Conv2d(half, half, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept, x = x.chunk(2, dim=1)
        x = torch.cat([kept, self.two(F.relu(self.one(x)))], 1)
        b, c, h, w = x.shape
        return x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


class Windows(nn.Module):
    """Swin's attention: images that lie channels last, cut into windows, and put together again."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.norm = nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        s = self.window
        y = self.norm(x).view(b, h // s, s, w // s, s, c)
        y = y.permute(0, 1, 3, 2, 4, 5).reshape(-1, s * s, c)
        q, k, v = self.qkv(y).reshape(len(y), s * s, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = ((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).reshape(-1, s * s, c)
        y = self.proj(y).view(b, h // s, w // s, s, s, c)
        return x + y.permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)


class Turned(nn.Module):
    """Channels last and back, by a function."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(*self.dims)


class Patches(nn.Module):
    """A convolution whose norm comes after the channels were turned to the last place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj, self.norm = nn.Conv2d(3, width, 2, 2), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


def head(width: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]


MODELS = {
    "convnext": lambda: nn.Sequential(
        *(nn.Conv2d(3, 16, 2, 2), ChannelsFirst(16), Inverted(16)),
        *(ChannelsFirst(16), nn.Conv2d(16, 24, 2, 2), Inverted(24)),
        *head(24),
    ),
    # as many channels as places: only the layer itself knows which are which
    "square": lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), ChannelsFirst(8), *head(8)),
    "squeeze": lambda: nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), NormAct(16), Squeeze(16, 4), nn.Conv2d(16, 24, 1), *head(24)
    ),
    "shuffle": lambda: nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), Shuffled(16), nn.ReLU(), Shuffled(16), *head(16)
    ),
    "swin": lambda: nn.Sequential(Patches(16), Windows(16, 2, 2), Turned(0, 3, 1, 2), *head(16)),
    "grouped": lambda: nn.Sequential(
        *(nn.Conv2d(3, 24, 1), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1, groups=3)),
        *(nn.BatchNorm2d(24), nn.ReLU(), *head(24)),
    ),
    "scaled": lambda: nn.Sequential(nn.Conv2d(3, 16, 1), Scale(16), nn.Conv2d(16, 24, 1), *head(24)),
    "holding": lambda: nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), Holding(16), nn.Conv2d(16, 24, 1), Holding(24)),
        *head(24),
    ),
}  # fmt: skip


def family_of(name: str) -> Pretrained:
    torch.manual_seed(0)
    return Pretrained(trained(MODELS[name]()), IMAGES, (Widths(multiple=1, steps=3), Depth()))


def leaves(model: nn.Module) -> list[type[nn.Module]]:
    """The layers' classes, which stay the user's."""
    return [type(m) for m in model.modules() if next(m.children(), None) is None]


@pytest.mark.parametrize("name", sorted(MODELS))
def test_it_is_thinned_and_exported_as_it_computes(name: str) -> None:
    family = family_of(name)
    thin = {d.name: d.options[0] for d in family.space.decisions if d.name.startswith("width:")}
    small = family.build({**family.original, **thin})
    weights = [sum(p.numel() for p in model.parameters()) for model in (small, family.model)]
    assert weights[0] < 0.4 * weights[1]
    assert leaves(small) == leaves(family.model)
    session = onnxruntime.InferenceSession(to_onnx(small, IMAGES[:1], fast=True))
    found = session.run(None, {session.get_inputs()[0].name: IMAGES[:1].numpy()})[0]
    assert np.allclose(found, small(IMAGES[:1]).detach(), atol=1e-5)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_its_pieces_add_up_to_it(name: str) -> None:
    family = family_of(name)
    assert type(pieces_of(family)).__name__ == "_Units"
    rows = np.concatenate([family.space.corner(False), family.space.corner(True)])
    found = Counts(family).estimate_codes(rows)
    built = [count(family.build(c), family.example()) for c in family.space.decode(rows)]
    assert found["params"].tolist() == [c.params for c in built]
    assert found["macs"].tolist() == [c.macs for c in built]


def test_a_norm_of_channels_first_takes_what_the_convolution_before_it_gives() -> None:
    for name in ("convnext", "square"):
        family = family_of(name)
        width = next(d for d in family.space.decisions if d.name == "width:0")
        module, shape = family.unit("0", {**family.original, "width:0": width.options[0]})
        assert [type(m) for m in module][:2] == [nn.Conv2d, ChannelsFirst]
        assert module(torch.randn(1, *shape)).shape[1] == width.options[0] < width.options[-1]


def test_a_norm_that_holds_its_activation_is_one_piece_with_its_convolution() -> None:
    family = family_of("holding")
    assert [u.name for u in family.units()] == ["0", "2", "6"]
    thin = {d.name: d.options[0] for d in family.space.decisions}
    module, shape = family.unit("0", {**family.original, **thin})
    assert [type(m) for m in module] == [nn.Conv2d, Holding]
    whole = family.build({**family.original, **thin})
    x = torch.randn(1, *shape)
    assert torch.equal(module(x), whole[1](whole[0](x)))


def test_a_turned_norm_is_a_piece_of_its_own() -> None:
    names = [u.name for u in family_of("swin").units()]
    assert names[:2] == ["0.proj", "0.norm"]


def test_odd_groups_of_a_convolution_have_a_choice_of_widths() -> None:
    """8 channels a group in 7 groups: no multiple of 8 but all."""
    conv = nn.Conv2d(56, 56, 3, padding=1, groups=7)
    model = nn.Sequential(nn.Conv2d(3, 56, 1), nn.ReLU(), conv, nn.ReLU(), *head(56))
    bound = Widths().bind(model, IMAGES)
    assert bound.decisions[1].options == (2, 4, 6, 8)
    assert [i.layer for i in bound.ignored] == ["6"]


class Placed(nn.Module):
    """A code of places that is made of sizes alone, and added."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.code = Code()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return (x + self.code((len(x), *x.shape[2:]))).mean((2, 3))


class Code(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, 8))

    def forward(self, sizes: tuple[int, int, int]) -> Tensor:
        b, h, w = sizes
        return self.weight[:, :h, :w].repeat(b, 1, 1, 1)


def test_a_branch_that_takes_no_tensor_stays(capfd: pytest.CaptureFixture[str]) -> None:
    bound = Depth().bind(Placed(), IMAGES)
    assert not bound.decisions
    assert Ignored("code", "depth", "its first input is no tensor") in bound.ignored
    assert capfd.readouterr().err == ""


def test_looking_for_blocks_leaves_the_model_as_it_was() -> None:
    model = MODELS["convnext"]().train()
    before = [(path, id(module), module.training) for path, module in model.named_modules()]
    assert Depth().bind(model, IMAGES).decisions
    assert before == [(path, id(module), module.training) for path, module in model.named_modules()]
    assert follow(model, IMAGES).output.shape == (2, 10)
