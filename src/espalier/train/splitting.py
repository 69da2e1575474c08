"""Few-shot supernets: one is split in two where its options want different shared weights.

Zhao et al., Few-Shot Neural Architecture Search (2021): two supernets, each for a part of the space,
rank better than one. Where to split is the question: see `train.matching` (Hu et al., 2022).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from espalier.errors import EspalierError
from espalier.space import Candidate, Option, Real, Space
from espalier.tasks import Task
from espalier.train.matching import Split, best_split, distances, random_split
from espalier.train.paths import Pass, Paths, Uniform


class FewShot(nn.Module):
    """Two copies of a supernet: the first runs alone until `divide`, then each its own candidates.

    It is trained, and its candidates are estimated, as a supernet is: `activate` picks the copy that
    holds the candidate. What was divided is kept with the weights.
    """

    column: Tensor
    sides: Tensor

    def __init__(self, supernet: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList([supernet, copy.deepcopy(supernet)])
        space: Space = supernet.space  # type: ignore[assignment]
        most = max(d.count for d in space.decisions if not isinstance(d, Real))
        self.register_buffer("column", torch.tensor(-1))
        self.register_buffer("sides", torch.zeros(most, dtype=torch.int64))
        self._running = 0

    @property
    def space(self) -> Space:
        """The supernet's."""
        found: Space = self.parts[0].space  # type: ignore[assignment]
        return found

    @property
    def active(self) -> Candidate | None:
        """What runs now."""
        return self.parts[self._running].active  # type: ignore[return-value]

    @property
    def divided(self) -> bool:
        """Whether there are two supernets yet."""
        return int(self.column) >= 0

    @property
    def split(self) -> Split | None:
        """What was divided, without the distances that said so; None before."""
        if not self.divided:
            return None
        decision = self.space.decisions[int(self.column)]
        sides = self.sides.tolist()
        first, second = (
            tuple(
                option for option in decision.options if sides[int(decision.code(option))] == side
            )
            for side in (0, 1)
        )
        return Split(decision.name, (first, second))

    def divide(self, split: Split) -> None:
        """Two supernets from now on, the second with copies of the weights of the first."""
        if self.divided:
            raise EspalierError("this supernet is divided already: wrap each part to go on")
        decision = self.space[split.decision]
        self.parts[1].load_state_dict(self.parts[0].state_dict())
        self.column.fill_(self.space.names.index(split.decision))
        for option in split.groups[1]:
            self.sides[int(decision.code(option))] = 1

    def part(self, candidate: Mapping[str, Option]) -> int:
        """Which copy holds a candidate."""
        column = int(self.column)
        if column < 0:
            return 0
        decision = self.space.decisions[column]
        if decision.name not in candidate:
            return 0  # not active in it: either would do
        return int(self.sides[int(decision.code(candidate[decision.name]))])

    def activate(self, candidate: Mapping[str, Option]) -> None:
        """Makes `forward` run a candidate. Errors: `SpaceError` where it is not valid."""
        self._running = self.part(candidate)
        self.parts[self._running].activate(candidate)  # type: ignore[operator]

    def extract(self, candidate: Mapping[str, Option]) -> nn.Module:
        """The candidate as a plain network with the weights of its copy."""
        network: nn.Module = self.parts[self.part(candidate)].extract(candidate)  # type: ignore[operator]
        return network

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.parts[self._running](x)
        return out


@dataclass
class Splitting(Paths):
    """The paths of another sampler on a `FewShot`, which is divided after a share `at` of training.

    `by`: "gradients", measured on `batches` batches of `batch` images, or "random", which is what
    gradients have to beat. `found` is the split once it is done, without its distances where a training
    was resumed after it.
    """

    few: FewShot
    task: Task
    by: Literal["gradients", "random"] = "gradients"
    at: float = 0.5
    batches: int = 16
    batch: int = 64
    paths: Paths = field(default_factory=Uniform)
    found: Split | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.by not in ("gradients", "random"):
            raise EspalierError(f"a supernet is split by gradients or random, got {self.by!r}")
        if not 0 <= self.at < 1:
            raise EspalierError(f"a split is after a share from 0 to below 1, got {self.at!r}")

    @property
    def module(self) -> nn.Module | None:  # type: ignore[override]
        """What the other sampler learns."""
        return self.paths.module

    def begin(self, space: Space, epoch: int, epochs: int, steps: int, seed: int) -> None:
        """Divides the supernet when it is time, and begins the other sampler."""
        if epoch >= round(self.at * epochs) and not self.few.divided:
            if self.by == "random":
                self.found = random_split(space, seed)
            else:
                found = distances(self.few, self.task, self.batches, self.batch, seed)
                self.found = best_split(space, found)
            self.few.divide(self.found)
        elif self.found is None:  # a training that goes on after the split
            self.found = self.few.split
        self.paths.begin(space, epoch, epochs, steps, seed)

    def __call__(self, step: int) -> Sequence[Pass]:
        """The other sampler's."""
        return self.paths(step)

    def learned(self, step: int, losses: Sequence[float]) -> None:
        """Tells the other sampler."""
        self.paths.learned(step, losses)

    def to_json(self) -> dict[str, Any]:
        """How and when it is split, and the other sampler's settings."""
        own = {"split": self.by, "at": self.at, "batches": self.batches, "batch": self.batch}
        return {**own, **self.paths.to_json()}
