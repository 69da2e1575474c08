"""Networks that run only on rows of pixels: they flatten by `view`, or have other weights than images'."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import espalier as esp
from espalier.compress import Pretrained, Widths, repair
from espalier.tasks import tensors
from espalier.train.running import laid_out, lay_out
from quick import QUICK

COLOURS = (3, 8, 8)


class Flattening(nn.Module):
    """The tutorials' network: convolutions, a view, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = functional.max_pool2d(torch.relu(self.second(x)), 2)
        return self.head(functional.dropout(x, 0.1, self.training).view(x.size(0), -1))


class Volumes(nn.Module):
    """Convolutions in space: their weights have five dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(x)).mean((2, 3, 4)))


class Labelled(tensors.TensorTask):
    """Random inputs of five classes."""

    metrics = esp.tasks.images("digits").metrics

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, targets)

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        right = float((outputs.argmax(1) == targets).float().mean())
        return {"accuracy": right, "loss": float(self.loss(outputs, targets))}


def labelled(*shape: int) -> Labelled:
    torch.manual_seed(0)
    splits = ("train", "validation", "test")
    return Labelled({s: (torch.randn(24, *shape), torch.arange(24) % 5) for s in splits}, 5)


@pytest.fixture(scope="module")
def images() -> esp.tasks.Task:
    """Images as tasks give them: their channels lie together."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 255, (120, 8, 8, 3), dtype=np.uint8)
    return esp.tasks.images({"x": x, "y": np.arange(120) % 5})


@pytest.mark.parametrize(("network", "shape"), [(Flattening, COLOURS), (Volumes, (3, 4, 4, 4))])
def test_every_stage_takes_what_needs_rows_of_pixels(network, shape) -> None:
    task = labelled(*shape)
    family = Pretrained(network(), torch.randn(2, *shape), (Widths(multiple=1),))
    group = next(name for name in family.space.names if "conv" in name or "first" in name)
    small = family.build(family.space.candidate({**family.original, group: 4}))
    recipe = esp.Recipe(epochs=1, batch=8, lr=0.01)
    esp.train.fit(copy.deepcopy(family.model), task, recipe, seed=0)
    repair.recalibrate(small, task)
    done = repair.reconstruct(small, family.model, torch.randn(32, *shape))
    assert not [row for row in done["skipped"] if "times" in row["reason"]]
    repair.finetune(small, family.model, task, recipe)
    assert set(esp.train.evaluate(small, task, "validation")) == {"accuracy", "loss"}


def test_a_model_that_flattens_by_view_is_shrunk(images, tmp_path: Path) -> None:
    found = esp.shrink(
        Flattening(), images, within={"params": "70%"}, budget="1s", out=tmp_path / "small",
        decisions="width:multiple=1,bits", baselines=False, on=QUICK,
    )  # fmt: skip
    assert found.publish().exists()
    assert found.best.metrics["params"].value <= 0.7 * found.original.metrics["params"].value


def test_layouts_are_found_out_without_a_trace(images) -> None:
    x = next(images.batches("train", 4))[0]
    free, bound = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).train(), Flattening().train()
    before = [t.clone() for n in (free, bound) for t in n.state_dict().values()]
    state = torch.get_rng_state()
    assert laid_out(free, x).is_contiguous(memory_format=torch.channels_last)
    assert laid_out(bound, x).is_contiguous()
    assert torch.equal(laid_out(bound, x), x)
    lay_out(free, x)
    lay_out(bound, x)
    assert free[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert bound.second.weight.is_contiguous()
    assert torch.equal(torch.get_rng_state(), state)
    assert free.training
    assert bound.norm.training
    after = [t for n in (free, bound) for t in n.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_other_errors_are_the_callers(images) -> None:
    x = next(images.batches("train", 4))[0]
    wrong = nn.Conv2d(4, 8, 3)
    assert torch.equal(laid_out(wrong, x), x)
    with pytest.raises(RuntimeError, match="channels"):
        wrong(laid_out(wrong, x))
