"""Path samplers: which candidates of a supernet run, and learn from what, in each step of a training.

A step is one or more passes over the same batch, whose gradients are added up. A sampler is a pure
function of the seed, the epoch and the step, so a training that was killed goes on as it would have.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from espalier.errors import EspalierError, SpaceError
from espalier.space import Candidate, Real, Space

Lesson = Literal["labels", "teacher", "both"]
_PATHS = 3  # purpose of the random stream of sampled candidates


class Pass(ABC):
    """One forward and backward pass of a step; subclass it to run something else than a candidate.

    `teach`: its outputs teach the passes after it. `learn_from`: the targets, the teacher's outputs,
    or both, mixed by the recipe's `distil`.
    """

    teach: bool = False
    learn_from: Lesson = "labels"

    @abstractmethod
    def apply(self, supernet: Any, batch: int) -> None:
        """Sets what the supernet runs next, on that many examples: `activate`, `mix`."""

    def penalty(self) -> Tensor | None:
        """What is added to the loss of this pass, such as an expected cost; called after forward."""
        return None


@dataclass(frozen=True)
class Path(Pass):
    """A pass of one candidate."""

    candidate: Candidate
    teach: bool = False
    learn_from: Lesson = "labels"

    def apply(self, supernet: Any, batch: int) -> None:
        """Activates the candidate."""
        supernet.activate(self.candidate)


class Paths(ABC):
    """A path sampler. `begin` is called before each epoch, then the sampler with each step's number.

    `module` holds what the sampler itself learns or remembers: its parameters are trained beside
    the supernet's by the same optimiser, its buffers are kept, too, in checkpoints.
    """

    module: nn.Module | None = None

    @abstractmethod
    def begin(self, space: Space, epoch: int, epochs: int, steps: int, seed: int) -> None:
        """An epoch of that many steps starts; `epoch` counts from 0."""

    @abstractmethod
    def __call__(self, step: int) -> Sequence[Pass]:
        """The passes of a step, in their order."""

    def learned(self, step: int, losses: Sequence[float]) -> None:
        """Called after the passes of a step with their losses; does nothing unless overridden."""
        return None

    def to_json(self) -> dict[str, Any]:
        """What the result depends on: a checkpoint of another is refused."""
        known: list[str] = [f.name for f in fields(self) if f.init] if is_dataclass(self) else []
        return {"method": type(self).__name__.lower(), **{n: getattr(self, n) for n in known}}


def stream(seed: int, epoch: int) -> np.random.Generator:
    """The random stream that an epoch's candidates are drawn from."""
    return np.random.default_rng([seed, epoch, _PATHS])


@dataclass
class Uniform(Paths):
    """`paths` candidates a step, drawn uniformly (single path one-shot; Guo et al., SPOS, 2020)."""

    paths: int = 1
    learn_from: Lesson = "labels"
    _drawn: list[Candidate] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _at_least("paths", self.paths, 1)
        if self.learn_from not in get_args(Lesson):
            known = ", ".join(get_args(Lesson))
            raise EspalierError(f"learn_from is one of {known}, got {self.learn_from!r}")

    def begin(self, space: Space, epoch: int, epochs: int, steps: int, seed: int) -> None:
        """Draws all candidates of the epoch."""
        self._drawn = space.decode(space.sample(steps * self.paths, stream(seed, epoch)))

    def __call__(self, step: int) -> list[Path]:
        """The step's candidates."""
        chosen = self._drawn[step * self.paths : (step + 1) * self.paths]
        return [Path(candidate, learn_from=self.learn_from) for candidate in chosen]


@dataclass
class Fair(Paths):
    """Strict fairness (Chu et al., FairNAS, 2021): every option is trained as often as its rivals.

    A decision with k options shows each of them once in every k candidates that have it active, in
    a random order. A step has `paths` candidates; by default as many as the largest number of
    options, so that a space of equal decisions trains every option once a step, as published.
    Where constraints refuse a candidate it is repaired, and fairness holds but nearly.
    """

    paths: int | None = None
    _drawn: list[Candidate] = field(default_factory=list, init=False, repr=False, compare=False)
    _each: int = field(default=1, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.paths is not None:
            _at_least("paths", self.paths, 1)

    def begin(self, space: Space, epoch: int, epochs: int, steps: int, seed: int) -> None:
        """Draws all candidates of the epoch. Errors: `SpaceError` for a real decision."""
        most = max((d.count for d in space.decisions), default=1)
        self._each = most if self.paths is None else self.paths
        codes = fair_codes(space, steps * self._each, stream(seed, epoch))
        self._drawn = space.decode(codes)

    def __call__(self, step: int) -> list[Path]:
        """The step's candidates."""
        return [Path(c) for c in self._drawn[step * self._each : (step + 1) * self._each]]


def fair_codes(space: Space, n: int, rng: np.random.Generator) -> NDArray[Any]:
    """n rows in which each decision goes through its options in shuffled rounds."""
    wrong = [d.name for d in space.decisions if isinstance(d, Real)]
    if wrong:
        raise SpaceError(
            f"fair paths go through all options of a decision, and {wrong[0]!r} is real: "
            "give it options, or use Uniform"
        )
    index = {name: column for column, name in enumerate(space.names)}
    codes = np.zeros((n, len(space)), dtype=space.dtype)
    placed: set[str] = set()
    left = list(space.decisions)
    while left:
        ready = [d for d in left if placed.issuperset(d.when)]  # parents decide who is active
        active = space.active(codes)
        for decision in ready:
            rows = np.flatnonzero(active[:, index[decision.name]])
            rounds = -(-len(rows) // decision.count)
            shuffled = rng.permuted(np.tile(np.arange(decision.count), (rounds, 1)), axis=1)
            codes[rows, index[decision.name]] = shuffled.ravel()[: len(rows)]
        placed.update(d.name for d in ready)
        left = [d for d in left if d.name not in placed]
    return space.repair(codes, rng) if space.constraints else space.canonical(codes)


@dataclass
class Sandwich(Paths):
    """The largest, the smallest and `random` drawn ones (Yu & Huang, 2019), taught by the largest.

    In-place distillation (Yu et al., BigNAS, 2020): the largest learns from the targets, the others
    from its outputs on the same batch and from the targets, mixed by the recipe's `distil`.
    """

    random: int = 1
    _ends: tuple[Path, ...] = field(default=(), init=False, repr=False, compare=False)
    _drawn: list[Candidate] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _at_least("random", self.random, 0)

    def begin(self, space: Space, epoch: int, epochs: int, steps: int, seed: int) -> None:
        """Draws the random candidates of the epoch."""
        largest, smallest = (space.decode(space.corner(last))[0] for last in (True, False))
        self._ends = (Path(largest, teach=True), Path(smallest, learn_from="both"))
        rng = stream(seed, epoch)
        self._drawn = space.decode(space.sample(steps * self.random, rng)) if self.random else []

    def __call__(self, step: int) -> list[Path]:
        """Largest, smallest, random ones."""
        chosen = self._drawn[step * self.random : (step + 1) * self.random]
        return [*self._ends, *(Path(candidate, learn_from="both") for candidate in chosen)]

    def to_json(self) -> dict[str, Any]:
        """Its settings."""
        return {"method": "sandwich", "random_subnets": self.random}


def _at_least(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise EspalierError(f"{name} is a whole number from {least}, got {value!r}")
