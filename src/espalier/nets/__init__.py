"""Families of networks: a space, and a network for each of its candidates.

`MobileNet` and `ResNet` are shipped, and `make("mobilenet", shape, classes)` gives one by name; so
are `NB201` and `NBMacro`, the networks of two tabular benchmarks (`make("nb201", shape, classes)`),
and the supernets of cells, `NB201Supernet` and `DARTSCells`.
There are two ways to make your own. Both are checked by `espalier.testing.family.check_family`.

The first way: declare a space and write `build`, which returns any plain `nn.Module`.

    import numpy as np
    from torch import nn

    import espalier as esp


    class Plain(esp.Family):
        shape, classes = (1, 8, 8), 10
        space = esp.Space(
            [
                esp.ordinal("width", 8, 16, 32),
                esp.integer("depth", 1, 4),
                esp.choice("kernel", 3, 5, when={"depth": (1, 2)}),  # deep ones keep to 3
                esp.real("dropout", 0.0, 0.5),
            ]
        )

        def build(self, candidate):
            channels, width, layers = self.shape[0], candidate["width"], []
            for _ in range(candidate["depth"]):
                layers += [nn.Conv2d(channels, width, candidate.get("kernel", 3), padding="same")]
                layers += [nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            head = [nn.Dropout(candidate["dropout"]), nn.Linear(width, self.classes)]
            return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head)

The second way: write one module from elastic layers, each decision declared where it acts. The
space is read off the module; the weights of all candidates are shared, so `activate` runs any of
them and `extract` gives any as a plain network. Where children are not simply run in order, write
`forward`.

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
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from espalier.nets import elastic
from espalier.nets.family import Family
from espalier.nets.registry import BENCHMARKS, FAMILIES, make
from espalier.nets.supernet import Supernet
from espalier.nets.units import Unit

if TYPE_CHECKING:
    from espalier.nets.close import CLOSENet as CLOSENet
    from espalier.nets.darts_cells import DARTSCells as DARTSCells
    from espalier.nets.hierarchical import HierarchicalViT as HierarchicalViT
    from espalier.nets.hybrid import Hybrid as Hybrid
    from espalier.nets.macro import NBMacro as NBMacro
    from espalier.nets.mobilenet import MobileNet as MobileNet
    from espalier.nets.multipath import MultiPath as MultiPath
    from espalier.nets.nb201 import NB201 as NB201
    from espalier.nets.nb201_supernet import NB201Supernet as NB201Supernet
    from espalier.nets.resnet import ResNet as ResNet
    from espalier.nets.superkernel import Superkernel as Superkernel

_LAZY = {
    "CLOSENet": "close",
    "DARTSCells": "darts",
    "HierarchicalViT": "hierarchical-vit",
    "Hybrid": "hybrid",
    "MobileNet": "mobilenet",
    "MultiPath": "multipath",
    "NB201": "nb201",
    "NB201Supernet": "nb201-supernet",
    "NBMacro": "nb_macro",
    "ResNet": "resnet",
    "Superkernel": "superkernel",
}

__all__ = [
    "BENCHMARKS",
    "FAMILIES",
    "NB201",
    "CLOSENet",
    "DARTSCells",
    "Family",
    "HierarchicalViT",
    "Hybrid",
    "MobileNet",
    "MultiPath",
    "NB201Supernet",
    "NBMacro",
    "ResNet",
    "Superkernel",
    "Supernet",
    "Unit",
    "elastic",
    "make",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        found = _LAZY[name]
        return FAMILIES[found] if found in FAMILIES else BENCHMARKS[found]
    raise AttributeError(f"module 'espalier.nets' has no attribute {name!r}")
