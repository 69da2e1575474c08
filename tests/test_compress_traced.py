"""Models whose forwards write sizes of their layers into code: traced, cut, and still themselves."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from espalier.compress import Pretrained, Widths
from espalier.compress.coupling.proof import without
from espalier.export import to_onnx

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def cut(model: nn.Module, x: Tensor, *inputs: Tensor, **kept: int) -> nn.Module:
    """The model with some groups cut (`__` for a dot); checked against the original with zeros."""
    family = Pretrained(model, x, (Widths(multiple=1),))
    choices = {f"width:{name.replace('__', '.')}": count for name, count in kept.items()}
    (bound,) = family.cuts
    assert not any(bound.groups[name.removeprefix("width:")].averaged for name in choices)
    network = family.build({**family.original, **choices})
    wanted = without(family.model, dict(bound.groups), bound.kept(choices))
    with torch.no_grad():
        for given in (x, *inputs):
            torch.testing.assert_close(network(given), wanted(given), rtol=1e-4, atol=1e-5)
    return network


class Tutorial(nn.Module):
    """PyTorch's tutorial on CIFAR-10: the size that is flattened stands in the model's forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 24), nn.Linear(24, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = x.view(-1, 16 * 5 * 5)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


class Parted(nn.Module):
    """The same in two parts; only the model itself knows what stands between them."""

    def __init__(self) -> None:
        super().__init__()
        pool = nn.MaxPool2d(2)
        self.features = nn.Sequential(nn.Conv2d(3, 6, 5), pool, nn.Conv2d(6, 16, 5), pool)
        self.classifier = nn.Sequential(nn.Linear(400, 24), nn.ReLU(), nn.Linear(24, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).view(-1, 16 * 5 * 5))


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (Tutorial, ["conv1", "conv2", "fc1", "fc2"]),
        (Parted, ["features.0", "features.2", "classifier.0"]),
    ],
)
def test_a_flattened_size_in_the_models_own_forward_follows(
    make: type[nn.Module], names: list[str]
) -> None:
    torch.manual_seed(0)
    model = make()
    family = Pretrained(model, IMAGES, (Widths(multiple=1),))
    assert family.space.names == tuple(f"width:{n}" for n in names)
    assert len(family.ignored) == 1  # the output
    network = cut(model, IMAGES, IMAGES[:1], **{names[1].replace(".", "__"): 4})
    assert list(network.state_dict()) == list(model.state_dict())
    twin = copy.deepcopy(network).train()
    twin(IMAGES).sum().backward()
    assert all(p.grad is not None for p in twin.parameters())
    assert len(to_onnx(network, IMAGES)) < len(to_onnx(family.model, IMAGES))


def test_where_no_size_is_written_the_model_keeps_its_class() -> None:
    torch.manual_seed(0)
    model = Tutorial()
    assert type(cut(model, IMAGES, conv1=3, fc1=12)) is Tutorial
    assert type(cut(model, IMAGES, conv1=3, conv2=4, fc1=12)) is not Tutorial
    assert type(model) is Tutorial


class Named(nn.Module):
    """A block that writes its inner width into code."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).reshape(x.shape[0], -1, 12))


class Around(nn.Module):
    """Such a block within a model that writes a size of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Linear(4, 8), Named()
        self.conv, self.out = nn.Conv1d(8, 6, 1), nn.Linear(6 * 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.conv(self.block(self.stem(x)).transpose(1, 2)).reshape(-1, 6 * 5))


@pytest.mark.parametrize(
    ("kept", "paths"),
    [
        ({"stem": 4}, []),
        ({"block__up": 4}, ["block"]),
        ({"conv": 2}, [""]),
        ({"stem": 4, "block__up": 4, "conv": 2}, ["", "block"]),
    ],
)
def test_only_what_holds_a_size_that_changes_is_traced(
    kept: dict[str, int], paths: list[str]
) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 4)
    network = cut(Around(), x, x[:1], **kept)
    graphs = [p for p, m in network.named_modules() if isinstance(m, fx.GraphModule)]
    assert graphs == paths
