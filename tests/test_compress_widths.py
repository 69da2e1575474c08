"""Widths: groups of coupled channels, and cut models against the original without those channels."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.compress.groups import Group
from espalier.compress.labelling import outputs
from espalier.compress.widths import BoundWidths, Widths


class Basic(nn.Module):
    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(i, o, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(o)
        self.conv2 = nn.Conv2d(o, o, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(o)
        self.short: nn.Module = nn.Identity() if i == o else nn.Conv2d(i, o, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.short(x))


def resnet() -> nn.Module:
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), Basic(8, 8, 1), Basic(8, 16, 2), *head)


class Inverted(nn.Module):
    """Depthwise, squeeze and excitation, PReLU; flattened before the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.prelu = nn.PReLU(8)
        self.expand = nn.Conv2d(8, 32, 1)
        self.depthwise = nn.Conv2d(32, 64, 3, 1, 1, groups=32)
        self.norm = nn.BatchNorm2d(64)
        self.squeeze = nn.Conv2d(64, 4, 1)
        self.excite = nn.Conv2d(4, 64, 1)
        self.project = nn.Conv2d(64, 8, 1)
        self.head = nn.Linear(8 * 4 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.prelu(self.stem(x))
        y = F.hardswish(self.norm(self.depthwise(F.relu6(self.expand(x)))))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        return self.head((x + self.project(y * gate)).flatten(1))


class Dense(nn.Module):
    """Concatenation, nearest upsampling, transposed convolution, a cut in half and a product."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.conv = nn.Conv2d(8, 12, 3, 1, 1)
        self.norm = nn.BatchNorm2d(20)
        self.gated = nn.Conv2d(20, 16, 1)
        self.up = nn.ConvTranspose2d(8, 12, 2, 2)
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.gelu(self.norm(torch.cat([x, self.conv(F.relu(x))], 1)))
        a, b = self.gated(x).chunk(2, 1)
        x = F.interpolate(a * torch.sigmoid(b), scale_factor=2)
        return self.head(self.up(x).amax((2, 3)))


class Shuffled(nn.Module):
    """Grouped convolution, half of the channels passed by, shuffled channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 1, 1)
        self.branch = nn.Conv2d(8, 8, 1)
        self.grouped = nn.Conv2d(16, 24, 3, 1, 1, groups=4)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.stem(x).chunk(2, 1)
        x = torch.cat([a, F.silu(self.branch(b))], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(F.relu(self.grouped(x)).mean((2, 3)))


def seeded(make: type[nn.Module], *args: object) -> nn.Module:
    torch.manual_seed(0)
    model = make(*args)
    for m in model.modules():  # norms that do something
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
    return model.eval()


def silenced(
    model: nn.Module, groups: Mapping[str, Group], kept: Mapping[str, Tensor]
) -> nn.Module:
    """The original with zeros where weights read channels that go: what cut models must equal."""
    network = copy.deepcopy(model)
    tensors = dict(network.named_parameters())
    for name, units in kept.items():
        gone = [u for u in range(groups[name].units) if u not in units.tolist()]
        assert any(m.consumed for m in groups[name].members)
        for m in groups[name].members:
            if m.consumed:
                rows = m.rows[gone].flatten()
                tensors[f"{m.path}.{m.tensor}".strip(".")].data.index_fill_(m.dim, rows, 0)
    return network


def check(model: nn.Module, x: Tensor, **settings: object) -> BoundWidths:
    """Random widths of all groups with an exact reference: cut, and silenced, compute the same."""
    bound = Widths(**settings).bind(model, x)  # type: ignore[arg-type]
    rng = torch.Generator().manual_seed(1)
    for _ in range(3):
        choices = {
            d.name: d.options[int(torch.randint(d.count, (), generator=rng))]
            for d in bound.decisions
            if not bound.groups[d.name.removeprefix("width:")].averaged
        }
        small = copy.deepcopy(model)
        bound.apply(small, choices)
        want = outputs(silenced(model, bound.groups, bound.kept(choices))(x))
        for a, b in zip(outputs(small(x)), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    return bound


CNNS = {
    resnet: {"0": 8, "1.conv1": 8, "2.conv1": 16, "2.conv2": 16},
    Inverted: {"stem": 8, "expand": 32, "squeeze": 4},
    Dense: {"stem": 8, "conv": 12, "gated": 8, "up": 12},
    Shuffled: {"stem": 2, "grouped": 6},
}


@pytest.mark.parametrize("make", CNNS, ids=lambda f: f.__name__)
@torch.no_grad()
def test_cnns_compute_what_the_original_does_without_the_channels(make: type[nn.Module]) -> None:
    bound = check(seeded(make), torch.randn(2, 3, 8, 8))
    assert {n: g.units for n, g in bound.groups.items()} == CNNS[make]
