"""How long and how fast to learn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from espalier.errors import EspalierError

Precision = Literal["fp32", "bf16", "auto"]


@dataclass(frozen=True)
class Recipe:
    """Stochastic gradient descent with Nesterov momentum and a cosine schedule after a warm-up.

    The defaults suit small convolutional networks. Errors: `EspalierError` for a value out of range.
    """

    epochs: int = 20
    batch: int = 64
    lr: float = 0.2  # the peak, for this batch
    momentum: float = 0.9
    weight_decay: float = 5e-4  # not on biases and norms
    warmup: float = 0.1  # share of all steps over which the rate rises linearly
    label_smoothing: float = 0.0
    augment: bool = True
    distil: float = 0.5  # share of a teacher in the loss, where there is one
    clip: float = 5.0  # largest norm of the gradient
    precision: Precision = "auto"  # auto: bf16 where the processor computes it and it pays

    def __post_init__(self) -> None:
        rules = (
            ("epochs", self.epochs >= 1, "1 or more"),
            ("batch", self.batch >= 2, "2 or more"),
            ("lr", self.lr > 0, "above 0"),
            ("momentum", 0 <= self.momentum < 1, "in 0..1, below 1"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"),
            ("warmup", 0 <= self.warmup < 1, "in 0..1, below 1"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "in 0..1, below 1"),
            ("distil", 0 <= self.distil <= 1, "in 0..1"),
            ("clip", self.clip > 0, "above 0"),
            ("precision", self.precision in get_args(Precision), "fp32, bf16 or auto"),
        )
        for name, kept, rule in rules:
            if not kept:
                raise EspalierError(
                    f"{name} of a recipe must be {rule}, got {getattr(self, name)!r}"
                )
