"""Layers of a vision transformer that are skipped while it is tuned, and the bandit that draws them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from espalier.compress.language.adapters.decisions import Adapters
from espalier.compress.language.anatomy import anatomy
from espalier.tasks import Task
from espalier.train.adamw import fit_adamw
from espalier.train.evaluate import evaluate
from espalier.train.seeds import generator, global_seed


@dataclass(frozen=True)
class Scale:
    """The model and its task, the new task, and how it is tuned.

    Sets of `skipped` layers are drawn in the first `search` of the `steps`; every `every` steps
    after the first `warm`, `draws` sets are compared. `randoms` sets are the baseline.
    """

    source: str
    target: str
    layers: int
    width: int
    pretraining: int
    steps: int
    search: int
    skipped: int = 2
    warm: int = 10
    every: int = 4
    draws: int = 3
    rate: float = 4.0
    randoms: int = 3
    rank: int = 4
    bottleneck: int = 8
    batch: int = 32


class Pixels(nn.Module):
    """A `transformers` classifier of images as a task wants it: images in, logits out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(pixel_values=x).logits
        return logits


class Skippable(nn.Module):
    """A layer, or where it is `skipped` a small adapter in its place: a bottleneck beside a shortcut,
    which adds nothing at first."""

    def __init__(self, layer: nn.Module, width: int, bottleneck: int) -> None:
        super().__init__()
        self.layer, self.skipped = layer, False
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor, *args: Any, **more: Any) -> Tensor:
        if self.skipped:
            added: Tensor = self.up(nn.functional.gelu(self.down(x)))
            return x + added
        out: Tensor = self.layer(x, *args, **more)
        return out


class Bandit:
    """How much each layer seems to be of no use; sets are drawn by softmax of it, without putting back."""

    def __init__(self, layers: int, count: int, rate: float) -> None:
        self.values, self.count, self.rate = np.zeros(layers), count, rate

    def draw(self, rng: np.random.Generator) -> list[int]:
        """A set of layers to skip."""
        likely = np.exp(self.values - self.values.max())
        found = rng.choice(len(likely), self.count, replace=False, p=likely / likely.sum())
        return sorted(found.tolist())

    def learn(self, sets: Sequence[Sequence[int]], losses: Sequence[float]) -> None:
        """Layers of sets whose exp(-loss) is above the mean become likelier to be skipped."""
        rewards = np.exp(-np.asarray(losses))
        for layers, reward in zip(sets, rewards - rewards.mean(), strict=True):
            self.values[list(layers)] += self.rate * reward

    def best(self) -> list[int]:
        """The layers that seem of least use."""
        return sorted(np.argsort(-self.values, kind="stable")[: self.count].tolist())


class Tuned:
    """A pretrained model with LoRA in its layers, each of which may be skipped."""

    def __init__(self, model: Any, setting: Scale, task: Task, seed: int) -> None:
        self.setting, self.task, self.seed = setting, task, seed
        made = copy.deepcopy(model)
        with global_seed(seed):
            self._classify(made, task.classes)
            parts = anatomy(made)
            bound = Adapters(("attention",), widest=setting.rank).bind(made, torch.zeros(1))
            bound.adapted(made, {"adapter:attention": 0})
            for layer in parts.layers:
                own = made.get_submodule(layer.path)
                made.set_submodule(layer.path, Skippable(own, parts.width, setting.bottleneck))
        for p in made.classifier.parameters():
            p.requires_grad_(True)
        self.layers: list[Any] = [made.get_submodule(layer.path) for layer in parts.layers]
        self.network = Pixels(made)

    def _classify(self, model: Any, classes: int) -> None:
        model.classifier = nn.Linear(model.classifier.in_features, classes)

    def skip(self, layers: Iterable[int]) -> None:
        """Skips just these layers."""
        chosen = set(layers)
        for i, layer in enumerate(self.layers):
            layer.skipped = i in chosen

    def settle(self, layers: Iterable[int]) -> None:
        """Skips just these layers for good: what never runs no longer learns."""
        self.skip(layers)
        for layer in self.layers:
            unused = layer.layer if layer.skipped else nn.ModuleList([layer.down, layer.up])
            unused.requires_grad_(False)

    def fit(self, steps: int, after: int = 0, network: nn.Module | None = None) -> None:
        """A part of the training."""
        fit_adamw(
            network or self.network,
            self.task,
            steps,
            self.seed,
            lr=3e-3,
            batch=self.setting.batch,
            after=after,
            of=self.setting.steps,
        )

    def figures(self) -> dict[str, Any]:
        """Accuracy, weights that learn, and multiplications of one image."""
        from torch.utils.flop_counter import FlopCounterMode

        x, _ = next(self.task.batches("test", 1))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self.network.eval()(x)
        learned = sum(p.numel() for p in self.network.parameters() if p.requires_grad)
        return {
            "skipped": [i for i, layer in enumerate(self.layers) if layer.skipped],
            "validation": evaluate(self.network, self.task, "validation")["accuracy"],
            "test": evaluate(self.network, self.task, "test")["accuracy"],
            "trainable": learned,
            "macs": counter.get_total_flops() // 2,
        }


class Searching(nn.Module):
    """The network while sets of layers are drawn: a new one for each training step."""

    def __init__(self, tuned: Tuned, seed: int) -> None:
        super().__init__()
        setting = tuned.setting
        self.network, self._tuned = tuned.network, [tuned]
        self.bandit = Bandit(len(tuned.layers), setting.skipped, setting.rate)
        self._rng, self._seed, self._step = np.random.default_rng([seed, 0xDA5]), seed, 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self._turn(self._tuned[0])
        out: Tensor = self.network(x)
        return out

    def _turn(self, tuned: Tuned) -> None:
        setting = tuned.setting
        if self._step >= setting.warm and self._step % setting.every == 0:
            self._compare(tuned)
        self._step += 1
        tuned.skip(self.bandit.draw(self._rng))

    @torch.no_grad()
    def _compare(self, tuned: Tuned) -> None:
        """Losses of some sets on one batch."""
        rows = generator(self._seed, self._step, 0xDA5)
        x, y = next(tuned.task.batches("train", 2 * tuned.setting.batch, rows))
        sets = [self.bandit.draw(self._rng) for _ in range(tuned.setting.draws)]
        losses = []
        for own in sets:
            tuned.skip(own)
            losses.append(float(tuned.task.loss(self.network(x), y)))
        self.bandit.learn(sets, losses)
