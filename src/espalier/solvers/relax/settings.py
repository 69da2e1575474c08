"""How long and how fast a search by relaxation learns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from espalier.errors import EspalierError
from espalier.train.recipe import Precision
from espalier.train.schedules import Schedule, cosine


@dataclass(frozen=True)
class Settings:
    """SGD with momentum for the weights, Adam for the architecture.

    The defaults are those of DARTS (Liu et al., 2019), with fewer epochs.
    Errors: `EspalierError` for a value out of range.
    """

    epochs: int = 20  # passes over the part of train that the weights learn from
    batch: int = 64  # of either step
    lr: float = 0.025  # the peak, of the weights
    lr_min: float = 0.001  # at the end
    momentum: float = 0.9
    weight_decay: float = 3e-4  # on all weights
    arch_lr: float = 3e-4
    arch_betas: tuple[float, float] = (0.5, 0.999)
    arch_decay: float = 1e-3  # pulls logits to 0, that is to even chances
    warmup_epochs: int = 0  # first epochs in which the architecture does not move
    arch_share: float = 0.5  # share of train that architecture steps learn from
    arch_every: int = 1  # weight steps for each architecture step
    clip: float = 5.0  # largest norm of the weights' gradient
    precision: Precision = "auto"
    augment: bool = True
    schedule: Schedule | None = None  # the rate by progress; None: a cosine from lr to lr_min

    def __post_init__(self) -> None:
        rules = (
            ("epochs", self.epochs >= 1, "1 or more"),
            ("batch", self.batch >= 2, "2 or more"),
            ("lr", self.lr > 0, "above 0"),
            ("lr_min", 0 <= self.lr_min <= self.lr, "in 0..lr"),
            ("momentum", 0 <= self.momentum < 1, "in 0..1, below 1"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"),
            ("arch_lr", self.arch_lr > 0, "above 0"),
            ("arch_betas", all(0 <= b < 1 for b in self.arch_betas), "in 0..1, below 1"),
            ("arch_decay", self.arch_decay >= 0, "0 or more"),
            ("warmup_epochs", self.warmup_epochs >= 0, "0 or more"),
            ("arch_share", 0 < self.arch_share < 1, "between 0 and 1"),
            ("arch_every", self.arch_every >= 1, "1 or more"),
            ("clip", self.clip > 0, "above 0"),
            ("precision", self.precision in get_args(Precision), "fp32, bf16 or auto"),
        )
        for name, kept, rule in rules:
            if not kept:
                raise EspalierError(
                    f"{name} of relax's settings must be {rule}, got {getattr(self, name)!r}"
                )

    def rate(self, progress: float) -> float:
        """The learning rate of the weights at a progress from 0 to 1."""
        chosen = cosine(self.lr, self.lr_min) if self.schedule is None else self.schedule
        return chosen(progress)
