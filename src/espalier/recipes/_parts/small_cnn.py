"""A small residual network as a user would write it, and its training: what recipes prune."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from espalier.tasks import Task
from espalier.train import Recipe as Training
from espalier.train import fit
from espalier.train.seeds import global_seed, mixed

_WEIGHTS = 31  # purpose of the random stream


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, a 1x1 convolution where shapes differ."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(out + self.shortcut(x))


class SmallCNN(nn.Module):
    """A stem and stages of blocks, each after the first at half the size; logits `(b, classes)`."""

    def __init__(
        self, shape: Sequence[int], classes: int, widths: Sequence[int], blocks: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(shape[0], widths[0], 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        stages: list[tuple[str, nn.Module]] = []
        before = widths[0]
        for index, width in enumerate(widths):
            for number in range(blocks):
                stride = 2 if index and not number else 1
                stages.append((f"{index}_{number}", Block(before, width, stride)))
                before = width
        self.body = nn.Sequential(OrderedDict(stages))
        self.linear = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(torch.relu(self.norm(self.conv(x))))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


def fresh(task: Task, widths: Sequence[int], blocks: int, seed: int) -> SmallCNN:
    """The network for a task, its weights decided by the seed."""
    with global_seed(seed, _WEIGHTS):
        return SmallCNN(task.shape, task.classes, widths, blocks)


def trained(
    task: Task, widths: Sequence[int], blocks: int, recipe: Training, seed: int
) -> SmallCNN:
    """The network after a training from fresh weights."""
    network = fresh(task, widths, blocks, seed)
    fit(network, task, recipe, mixed(seed, _WEIGHTS))
    return network.eval()
