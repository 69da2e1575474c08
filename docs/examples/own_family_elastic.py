"""A family of your own, the second way: one module, its decisions declared where they act."""

import numpy as np
from torch import nn

import espalier as esp


class Block(nn.Module):
    def __init__(self, width, i):
        super().__init__()
        kernel = esp.choice(f"kernel{i}", 3, 5, 7)
        self.mix = esp.elastic.DepthwiseConv2d(width, kernel, bias=False)
        self.norm, self.act = esp.elastic.BatchNorm2d(width), nn.GELU()
        self.point = esp.elastic.Conv2d(width, width, kernel=1)

    def forward(self, x):
        return x + self.point(self.act(self.norm(self.mix(x))))


class Mixer(esp.Supernet):
    def __init__(self, shape=(1, 8, 8), classes=10):
        super().__init__(shape, classes)
        width = esp.ordinal("width", 16, 32, 48, 64)
        self.stem = esp.elastic.Conv2d(shape[0], width, kernel=3, stride=2)
        self.body = esp.elastic.Repeat(esp.ordinal("depth", 1, 2, 3), lambda i: Block(width, i))
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = esp.elastic.Linear(width, classes)


if __name__ == "__main__":
    family = Mixer()
    candidate = family.space.decode(family.space.sample(1, np.random.default_rng(0)))[0]
    print(candidate)
    print(sum(p.numel() for p in family.build(candidate).parameters()), "parameters")
