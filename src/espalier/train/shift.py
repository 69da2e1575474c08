"""Paths drawn by complexity, shifting to where networks still get better.

The range of a price (MACs, say) is cut into bins. In each step a bin is drawn, a target within it,
and a generator writes the subnet to train; the generator learns from the same loss and from how far
the price is off the target. Every few epochs the bins' losses are compared with those before, and
bins whose loss fell more are drawn more often. Uniform sampling of options hardly ever gives very
small or very large networks; this does (Zhang et al., ShiftNAS: Improving One-shot NAS via
Probability Shift, 2023, https://arxiv.org/abs/2307.08300). Differs in that the generator first
learns to meet targets alone, which takes no pass of a network, and in that it is kept from always
writing the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from espalier.errors import EspalierError
from espalier.space import Candidate, Space
from espalier.train import distributed
from espalier.train.generator import Generator, Price
from espalier.train.memory import Memory
from espalier.train.onehot import one_hot
from espalier.train.paths import Pass, Paths
from espalier.train.running import device_of
from espalier.train.seeds import generator as stream
from espalier.train.seeds import global_seed

_BINS, _NOISE, _START, _WARM = 21, 22, 23, 24  # purposes of random streams


@dataclass(frozen=True)
class Shift:
    """How bins are drawn and the generator learns.

    - `bins`: regions of the price, each from so much to the same number of times as much.
    - `sharpness`: a bin's probability is the softmax over bins of how much its loss fell, in nats,
      times this; 0 keeps all bins as likely.
    - `every`: epochs from one comparison to the next.
    - `off`: weight of |price - target| / target beside the loss. `targets`: such prices a step, the
      first of them that of the subnet that runs; the others cost no pass of the network.
    - `open`: weight of the choices' entropy (0 to 1), which keeps what is written for one target
      from being always the same.
    - `warmup`: steps in which the generator learns to meet targets, before the training.
    - `lr`, `hidden`, `temperature`: of the generator, its LSTM and its softmax.
    """

    bins: int = 8
    sharpness: float = 3.0
    every: int = 2
    off: float = 2.0
    open: float = 0.1
    targets: int = 16
    warmup: int = 300
    lr: float = 5e-3
    hidden: int = 48
    temperature: float = 1.0

    def __post_init__(self) -> None:
        rules = (
            ("bins", self.bins >= 2, "2 or more"),
            ("sharpness", self.sharpness >= 0, "0 or more"),
            ("every", self.every >= 1, "1 or more"),
            ("off", self.off >= 0, "0 or more"),
            ("open", self.open >= 0, "0 or more"),
            ("targets", self.targets >= 1, "1 or more"),
            ("warmup", self.warmup >= 0, "0 or more"),
            ("lr", self.lr > 0, "above 0"),
            ("hidden", self.hidden >= 1, "1 or more"),
            ("temperature", self.temperature > 0, "above 0"),
        )
        for name, kept, rule in rules:
            if not kept:
                raise EspalierError(
                    f"{name} of a shift must be {rule}, got {getattr(self, name)!r}"
                )


class Scale:
    """Prices as places in the range from the first to the last candidate: 0 to 1, by ratio.

    Equal steps are equal ratios of prices, as relative errors are what targets are met by, and the
    dearest network may be many times the cheapest.
    Errors: `EspalierError` where the last candidate is not dearer than the first.
    """

    def __init__(self, space: Space, price: Price) -> None:
        ends = [space.decode(space.corner(last))[0] for last in (False, True)]
        with torch.no_grad():
            low, high = (float(p) for p in price(one_hot(space, ends)))
        if not 0 < low < high:
            raise EspalierError(
                "a price must grow from the first to the last candidate of the space, it goes from"
                f" {low:g} to {high:g}: put the cheapest option of each decision first"
            )
        self.low, self.high, self._price = low, high, price
        self._log = math.log(high / low)

    def place(self, price: float) -> float:
        """Where a price, above 0, lies in the range."""
        return math.log(price / self.low) / self._log

    def places(self, choices: Mapping[str, Tensor]) -> Tensor:
        """Where the prices of choices lie in the range, `(n,)`."""
        found: Tensor = (self._price(choices) / self.low).log() / self._log
        return found

    def off(self, choices: Mapping[str, Tensor], places: Tensor) -> Tensor:
        """|price - target| / target of each row of choices, for the places of targets."""
        targets = self.low * (places * self._log).exp()
        return (self._price(choices) - targets).abs() / targets


@dataclass(frozen=True)
class Written(Pass):
    """A pass of the architecture in the first row of choices; their gradients are kept."""

    choices: Mapping[str, Tensor]
    extra: Tensor

    def apply(self, supernet: Any, batch: int) -> None:
        """Mixes with the one-hot choices."""
        device = device_of(supernet)
        supernet.mix({name: rows[0].to(device) for name, rows in self.choices.items()})

    def penalty(self) -> Tensor:
        """How far prices are off their targets."""
        return self.extra


class Shifting(Paths):
    """One written subnet a step; the generator learns beside the supernet, by Adam.

    `price` of weights `{decision: (n, options)}` is `(n,)`, differentiable. Use a new object for
    each training. `history` has a row an epoch with the bins' probabilities and losses.
    """

    def __init__(
        self, space: Space, price: Price, shift: Shift | None = None, seed: int = 0
    ) -> None:
        self.shift = Shift() if shift is None else shift
        self.scale = Scale(space, price)
        self.seed = seed
        self.history: list[dict[str, Any]] = []
        with global_seed(seed, _START):
            self.generator = Generator(space, self.shift.hidden)
        self.module: Memory = Memory(self.generator, self.shift.bins, self.shift.lr)
        self._epoch_state: tuple[np.random.Generator, torch.Generator] | None = None
        self._bin, self._extra = 0, 0.0
        self._meet()

    def candidate(self, price: float, tries: int = 1, seed: int = 0) -> Candidate:
        """The architecture for a price; of several tries, all but one drawn, the nearest."""
        return self.generator.write(self.scale.place(price), self.scale.places, tries, seed)

    def _meet(self) -> None:
        """The generator learns to meet targets, all equally likely; no network is run."""
        noise = stream(self.seed, _WARM)
        for _ in range(self.shift.warmup):
            wanted = torch.rand(2 * self.shift.targets, generator=noise)
            self._written(wanted, noise)[1].backward()  # type: ignore[no-untyped-call]
            self.module.step()
        self.module.keep()

    def _written(self, wanted: Tensor, noise: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        """Architectures for targets, and what the generator is to make less."""
        shift = self.shift
        choices, opened = self.generator.draw(wanted, noise, shift.temperature)
        return choices, shift.off * self.scale.off(choices, wanted).mean() - shift.open * opened

    def begin(self, space: Space, epoch: int, epochs: int, steps: int, seed: int) -> None:
        """Takes up the generator as it was kept, and shifts where it is time to."""
        self.module.restore()
        if epoch and epoch % self.shift.every == 0:
            self.module.shift(self.shift.sharpness)
        self.history.append({"epoch": epoch + 1, **self.module.to_json()})
        self._epoch_state = np.random.default_rng([seed, epoch, _BINS]), stream(seed, epoch, _NOISE)

    def __call__(self, step: int) -> list[Written]:
        """The one pass of a step."""
        assert self._epoch_state is not None
        rng, noise = self._epoch_state
        count, bins = self.shift.targets, self.shift.bins
        likely = self.module.probabilities.double().numpy()
        drawn = rng.choice(bins, count, p=likely / likely.sum())
        wanted = torch.from_numpy((drawn + rng.random(count)) / bins).float()
        choices, extra = self._written(wanted, noise)
        self._bin, self._extra = int(drawn[0]), float(extra.detach())
        return [Written(choices, extra)]

    def learned(self, step: int, losses: Sequence[float]) -> None:
        """The generator takes its step, the same on all processes; the loss is noted with the bin."""
        self.module.note(self._bin, losses[0] - self._extra)
        learned = list(self.generator.parameters())
        distributed.combine(learned, 0.0, 1 / distributed.ranks())
        self.module.step()
        self.module.keep()

    def to_json(self) -> dict[str, Any]:
        """Its settings."""
        return {
            "method": "shifting",
            **asdict(self.shift),
            "range": [self.scale.low, self.scale.high],
        }
