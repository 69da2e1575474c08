"""A small trained model and its data, for the tests of shrinking."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import espalier as esp


class Residual(nn.Module):
    """A plain residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.relu(x + self.bn(self.conv(x)))
        return out


class Small(nn.Module):
    """A convolutional network of 3 widths and 1 block that can be left out."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.block = Residual(8)
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.head = nn.Conv2d(16, 12, 1)
        self.fc = nn.Linear(12, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(torch.relu(self.bn(self.stem(x))))
        x = torch.relu(self.head(torch.relu(self.down(x))))
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


@cache
def task() -> Any:
    """Digits, few of them."""
    return esp.tasks.images("digits", train=256, validation=128, test=128)


@cache
def trained() -> nn.Module:
    """A model that learned something."""
    torch.manual_seed(0)
    model = Small()
    esp.train.fit(model, task(), esp.Recipe(epochs=10, batch=16, lr=0.2), 0)
    return model.eval()
