"""A family of your own, the first way: declare a space, write `build`."""

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


if __name__ == "__main__":
    family = Plain()
    candidate = family.space.decode(family.space.sample(1, np.random.default_rng(0)))[0]
    print(candidate)
    print(sum(p.numel() for p in family.build(candidate).parameters()), "parameters")
