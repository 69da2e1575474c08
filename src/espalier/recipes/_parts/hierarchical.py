"""Supernets of multi-stage transformers that recipes train in several ways and judge alike."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from espalier.nets.hierarchical import HierarchicalViT
    from espalier.space import Candidate
    from espalier.tasks import Split, Task
    from espalier.train import Paths


@dataclass(frozen=True)
class Sizes:
    """What is elastic in the supernet; options by stage where they are nested."""

    widths: tuple[tuple[int, ...], ...] = ((16, 24, 32), (32, 48, 64))
    heads: tuple[tuple[int, ...], ...] = ((1, 2), (2, 3, 4))
    depth: tuple[int, ...] = (1, 2, 3)
    ratio: tuple[int, ...] = (1, 2, 3)
    patch: int = 2


TINY = Sizes(((8, 16), (16, 24)), ((1, 2), (1, 2)), depth=(1, 2), ratio=(1, 2))
LARGE = Sizes(
    ((64, 96, 128), (128, 192, 256), (256, 384, 512)),
    ((2, 4), (4, 6, 8), (8, 12, 16)),
    depth=(2, 4, 6),
)


def device_for(scale: str) -> str:
    """An accelerator at the papers' scale, if there is one."""
    import torch

    return "cuda" if scale == "gpu" and torch.cuda.is_available() else "cpu"


class Clock:
    """Seconds: the processor's, which other programs disturb little; the wall's on an accelerator."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __call__(self) -> float:
        """The time now."""
        if self.device == "cpu":
            return time.process_time()
        import torch

        torch.cuda.synchronize()
        return time.perf_counter()


class Nets:
    """Supernets of one kind on one task, always with the same first weights."""

    def __init__(
        self, task: str, sizes: Sizes, seed: int, device: str, batch: int = 64, lr: float = 0.1
    ) -> None:
        from espalier import tasks

        self.task: Task = tasks.make(task, seed)
        self.sizes, self.seed, self.device = sizes, seed, device
        self.batch, self.lr, self.clock = batch, lr, Clock(device)

    def fresh(self) -> HierarchicalViT:
        """One that is not trained."""
        import torch

        from espalier.nets.hierarchical import HierarchicalViT

        torch.manual_seed(self.seed)
        sizes = self.sizes
        made = HierarchicalViT(
            self.task.shape,
            self.task.classes,
            widths=sizes.widths,
            heads=sizes.heads,
            depth=sizes.depth,
            ratio=sizes.ratio,
            patch=sizes.patch,
        )
        return made.to(self.device)

    def trained(self, paths: Paths, epochs: int) -> tuple[HierarchicalViT, float]:
        """One trained by a path sampler, and the seconds that it took."""
        from espalier.train import Recipe, train_supernet

        net = self.fresh()
        recipe = Recipe(
            epochs=max(1, epochs),
            batch=self.batch,
            lr=self.lr,
            weight_decay=1e-4,
            clip=1.0,
            precision="fp32",
        )
        start = self.clock()
        train_supernet(net, self.task, recipe, self.seed, paths=paths)
        return net, self.clock() - start

    def accuracies(self, net: Any, chosen: Iterable[Candidate], split: Split) -> list[float]:
        """With the shared weights; nothing is set anew for each, as norms are of single tokens."""
        from espalier.train import evaluate

        found = []
        for candidate in chosen:
            net.activate(candidate)
            found.append(evaluate(net, self.task, split)["accuracy"])
        return found
