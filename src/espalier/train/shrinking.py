"""Path samplers on a part of the space, and parts that grow by a calendar: progressive shrinking.

Cai et al., Once-for-All (2020): the largest network first, then smaller kernels, depths and widths,
one after the other, so that small networks start from weights that large ones have already learned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from espalier.errors import EspalierError, SpaceError, unknown
from espalier.space import Constraint, Decision, Forbid, Option, Ordinal, Real, Space
from espalier.train.paths import Lesson, Pass, Paths, Uniform

# By decision, or by a pattern such as "*.kernel": the options that stay; a number n: the n last.
Part = Mapping[str, Sequence[Option] | int]


def restricted(space: Space, part: Part) -> Space:
    """The space with fewer options: its candidates are candidates of `space`.

    Keys are names or patterns of names; where several fit, the last one counts. Decisions that no
    candidate has active any more are left out. Errors: `SpaceError` for what the space has not.
    """
    for key in part:
        if not any(fnmatchcase(name, key) for name in space.names):
            raise SpaceError(unknown("decision", key, space.names))
    kept: dict[str, Decision] = {}
    waiting = list(space.decisions)
    while waiting:
        decision = waiting.pop(0)
        if any(d.name in decision.when for d in waiting):
            waiting.append(decision)  # its parents come first
            continue
        when = {
            parent: tuple(o for o in allowed if _has(kept.get(parent), o))
            for parent, allowed in decision.when.items()
        }
        if all(when.values()):
            kept[decision.name] = _fewer(decision, part, when)
    return Space([kept[n] for n in space.names if n in kept], _constraints(space, kept))


def _fewer(decision: Decision, part: Part, when: Mapping[str, tuple[Option, ...]]) -> Decision:
    """The decision with the options that stay, in its own order."""
    asked = [stays for key, stays in part.items() if fnmatchcase(decision.name, key)]
    if not asked:
        return replace(decision, when=when)
    if isinstance(decision, Real):
        raise SpaceError(
            f"a real decision has no options to choose among: leave {decision.name!r} out"
        )
    stays = asked[-1]
    if isinstance(stays, str):
        raise SpaceError(f"options are a sequence or a number of options, got {stays!r}")
    if isinstance(stays, int):
        if stays < 1:
            raise SpaceError(f"at least 1 option of {decision.name!r} must stay, got {stays}")
        codes = range(max(decision.count - stays, 0), decision.count)
    else:
        codes = sorted({int(decision.code(option)) for option in stays})  # type: ignore[assignment]
    options = tuple(decision.options[code] for code in codes)
    if hasattr(decision, "options") and decision.kind in ("categorical", "ordinal"):
        return replace(decision, options=options, when=when)  # type: ignore[call-arg]
    return Ordinal(decision.name, options, when=when)


def _has(decision: Decision | None, option: Option) -> bool:
    return decision is not None and option in decision.options


def _constraints(space: Space, kept: Mapping[str, Decision]) -> list[Constraint]:
    """Those that can still be broken: a decision that is gone was inactive, which keeps them."""
    return [
        c
        for c in space.constraints
        if all(name in kept for name in c.names)
        and not (
            isinstance(c, Forbid)
            and any(
                not isinstance(kept[n], Real) and not _has(kept[n], o) for n, o in c.options.items()
            )
        )
    ]


@dataclass
class Within(Paths):
    """The paths of another sampler, on a part of the space: `Within({"*.kernel": (5,)}, Uniform())`.

    Few-shot NAS (Zhao et al., 2021) trains each part with a supernet of its own.
    """

    part: Part
    paths: Paths = field(default_factory=Uniform)
    _space: tuple[str, Space] | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def module(self) -> nn.Module | None:  # type: ignore[override]
        """What the other sampler learns."""
        return self.paths.module

    def begin(self, space: Space, epoch: int, epochs: int, steps: int, seed: int) -> None:
        """Begins the other sampler on the part."""
        if self._space is None or self._space[0] != space.fingerprint:
            self._space = space.fingerprint, restricted(space, self.part)
        self.paths.begin(self._space[1], epoch, epochs, steps, seed)

    def __call__(self, step: int) -> Sequence[Pass]:
        """The other sampler's."""
        return self.paths(step)

    def learned(self, step: int, losses: Sequence[float]) -> None:
        """Tells the other sampler."""
        self.paths.learned(step, losses)

    def to_json(self) -> dict[str, Any]:
        """The part, and the other sampler's settings."""
        return {"within": _plain(self.part), **self.paths.to_json()}


@dataclass(frozen=True)
class Stage:
    """A stretch of a calendar: the part of the space, its share of the epochs, subnets a step."""

    part: Part
    share: float = 1.0  # of the sum of all stages' shares
    subnets: int = 1
    learn_from: Lesson = "both"

    def __post_init__(self) -> None:
        if not self.share > 0:
            raise EspalierError(f"the share of a stage must be above 0, got {self.share!r}")
        Uniform(self.subnets, self.learn_from)  # now, and not once the stages before have run


@dataclass
class Shrinking(Paths):
    """Progressive shrinking: stages one after the other, each on a part of the space.

    Every subnet learns from the targets and from a teacher, which is the largest network as it was
    before: give it to `train_supernet`; a stage with `learn_from="labels"` needs none. The first
    stage is mostly `Stage({"*": 1}, learn_from="labels")`, the largest alone. Of `epochs` each
    stage gets its share, rounded, one at least.
    """

    stages: tuple[Stage, ...]
    _now: Within | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.stages = tuple(self.stages)
        if not self.stages or not all(isinstance(stage, Stage) for stage in self.stages):
            raise EspalierError(f"a calendar is one Stage or more, got {list(self.stages)}")

    def begin(self, space: Space, epoch: int, epochs: int, steps: int, seed: int) -> None:
        """Draws the epoch's candidates from the part of its stage."""
        now = self.stages[self.stage(epoch, epochs)]
        self._now = Within(now.part, Uniform(now.subnets, now.learn_from))
        self._now.begin(space, epoch, epochs, steps, seed)

    def stage(self, epoch: int, epochs: int) -> int:
        """Which stage an epoch belongs to. Errors: `EspalierError` with fewer epochs than stages."""
        if epochs < len(self.stages):
            raise EspalierError(
                f"a calendar of {len(self.stages)} stages needs as many epochs, got {epochs}"
            )
        total, done = sum(s.share for s in self.stages), 0.0
        last = 0  # the first epoch after the stage
        for index, stage in enumerate(self.stages):
            done += stage.share
            after = len(self.stages) - index - 1  # each of them needs one epoch
            last = min(max(round(epochs * done / total), last + 1), epochs - after)
            if epoch < last:
                return index
        return len(self.stages) - 1

    def __call__(self, step: int) -> Sequence[Pass]:
        """The step's candidates."""
        assert self._now is not None  # begin was called
        return self._now(step)

    def to_json(self) -> dict[str, Any]:
        """The calendar."""
        rows = [[_plain(s.part), s.share, s.subnets, s.learn_from] for s in self.stages]
        return {"method": "shrinking", "stages": rows}


def _plain(part: Part) -> list[list[Any]]:
    return [[key, stays if isinstance(stays, int) else list(stays)] for key, stays in part.items()]
