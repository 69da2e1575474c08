"""A small language of networks: an expression of modules is a family, and its space a tree.

After DeepArchitect (Negrinho & Gordon, 2017, https://arxiv.org/abs/1704.08792). A basic module has
hyperparameters, each with its options; a compound one says how others go together. What is left
open becomes a decision, and a decision that only some options lead to hangs on them, so that a
candidate is one leaf of the tree. What differs: nothing is executed while the tree is walked, the
conditions of the space are the tree.

    Concat(Conv((8, 16), kernel=(3, 5)), Repeat(Or(Conv(16), Pool(("max", "mean"))), times=(0, 1, 2)))
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from espalier.errors import SpaceError
from espalier.nets.family import Family
from espalier.nets.wired import Wire, Wired
from espalier.space import Candidate, Decision, Space, choice, ordinal

When = Mapping[str, Any]
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Site:
    """Where a module stands in the network being written: its name, the wire and its shape."""

    wired: Wired
    wire: Wire
    shape: Shape
    candidate: Candidate


class Module(ABC):
    """A word of the language. `path` names the place, and with it the decisions, of each use."""

    @abstractmethod
    def decisions(self, path: str, when: When) -> list[Decision]:
        """What is left open, to be decided under `when`."""

    @abstractmethod
    def write(self, path: str, site: Site) -> Site:
        """The network behind this module, for the options that the candidate has here."""


# --- basic modules ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Conv(Module):
    """A convolution that keeps the size, batch-norm, ReLU; `separable`: by channel, then 1x1."""

    filters: int | Sequence[int]
    kernel: int | Sequence[int] = 3
    separable: bool | Sequence[bool] = False

    def decisions(self, path: str, when: When) -> list[Decision]:
        """Filters, kernel, separable: those that have several options."""
        return [
            *_open(ordinal, f"{path}.filters", self.filters, when),
            *_open(ordinal, f"{path}.kernel", self.kernel, when),
            *_open(choice, f"{path}.separable", self.separable, when),
        ]

    def write(self, path: str, site: Site) -> Site:
        """The layers."""
        filters = int(_option(f"{path}.filters", self.filters, site.candidate))
        kernel = int(_option(f"{path}.kernel", self.kernel, site.candidate))
        channels, height, width = site.shape
        layers: list[tuple[str, nn.Module]] = []
        if _option(f"{path}.separable", self.separable, site.candidate):
            by_channel = nn.Conv2d(
                channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False
            )
            layers += [("by_channel", by_channel)]
            kernel = 1
        conv = nn.Conv2d(channels, filters, kernel, padding=kernel // 2, bias=False)
        layers += [("conv", conv), ("norm", nn.BatchNorm2d(filters)), ("act", nn.ReLU())]
        return _after(site, path, layers, (filters, height, width))


@dataclass(frozen=True)
class Pool(Module):
    """Halves the size, by the largest ("max") or the mean of 2x2; nothing is done to one pixel."""

    kind: str | Sequence[str] = "max"

    def decisions(self, path: str, when: When) -> list[Decision]:
        """Which of the kinds."""
        return _open(choice, f"{path}.kind", self.kind, when)

    def write(self, path: str, site: Site) -> Site:
        """The layer."""
        channels, height, width = site.shape
        if min(height, width) < 2:
            return site
        largest = _option(f"{path}.kind", self.kind, site.candidate) == "max"
        layer = nn.MaxPool2d(2) if largest else nn.AvgPool2d(2)
        return _after(site, path, [("pool", layer)], (channels, height // 2, width // 2))


@dataclass(frozen=True)
class Dropout(Module):
    """Whole channels are dropped with probability `p`."""

    p: float | Sequence[float]

    def decisions(self, path: str, when: When) -> list[Decision]:
        """Which probability."""
        return _open(ordinal, f"{path}.p", self.p, when)

    def write(self, path: str, site: Site) -> Site:
        """The layer."""
        p = float(_option(f"{path}.p", self.p, site.candidate))
        return _after(site, path, [("drop", nn.Dropout2d(p))], site.shape)


# --- compound modules -------------------------------------------------------------------------


class Concat(Module):
    """Modules one after the other."""

    def __init__(self, *parts: Module) -> None:
        self.parts = parts

    def decisions(self, path: str, when: When) -> list[Decision]:
        """Those of every part."""
        return [d for i, part in enumerate(self.parts) for d in part.decisions(f"{path}.{i}", when)]

    def write(self, path: str, site: Site) -> Site:
        """Every part."""
        for i, part in enumerate(self.parts):
            site = part.write(f"{path}.{i}", site)
        return site


class Or(Module):
    """One of several modules."""

    def __init__(self, *parts: Module) -> None:
        self.parts = parts

    def decisions(self, path: str, when: When) -> list[Decision]:
        """Which one, and under each what is open in it."""
        which = choice(f"{path}.or", *range(len(self.parts)), when=when)
        inner = [
            d
            for i, part in enumerate(self.parts)
            for d in part.decisions(f"{path}.{i}", {which.name: (i,)})
        ]
        return [which, *inner]

    def write(self, path: str, site: Site) -> Site:
        """The one."""
        i = int(site.candidate[f"{path}.or"])
        return self.parts[i].write(f"{path}.{i}", site)


class Optional(Module):
    """A module, or nothing."""

    def __init__(self, part: Module) -> None:
        self.part = part

    def decisions(self, path: str, when: When) -> list[Decision]:
        """Whether, and under "yes" what is open in it."""
        use = choice(f"{path}.use", False, True, when=when)
        return [use, *self.part.decisions(f"{path}.0", {use.name: (True,)})]

    def write(self, path: str, site: Site) -> Site:
        """The module where it is used."""
        return self.part.write(f"{path}.0", site) if site.candidate[f"{path}.use"] else site


class Repeat(Module):
    """A module several times in a row; each time it decides anew, or all alike where `tied`."""

    def __init__(self, part: Module, times: Sequence[int], tied: bool = False) -> None:
        self.part, self.times, self.tied = part, tuple(times), tied

    def decisions(self, path: str, when: When) -> list[Decision]:
        """How often, and what is open in each repetition that this leads to."""
        times = ordinal(f"{path}.times", *self.times, when=when)
        rounds = min(1, max(self.times)) if self.tied else max(self.times)
        inner = [
            d
            for i in range(rounds)
            for d in self.part.decisions(
                f"{path}.{i}", {times.name: [t for t in self.times if t > i]}
            )
        ]
        return [times, *inner]

    def write(self, path: str, site: Site) -> Site:
        """The repetitions."""
        for i in range(int(site.candidate[f"{path}.times"])):
            if self.tied:
                site = _renamed(self.part, f"{path}.0", f"{path}.{i}", site)
            else:
                site = self.part.write(f"{path}.{i}", site)
        return site


class Residual(Module):
    """A module beside a shortcut; a 1x1 convolution is in the shortcut where channels differ.

    Errors: `SpaceError` when built, for a module that changes the size.
    """

    def __init__(self, part: Module) -> None:
        self.part = part

    def decisions(self, path: str, when: When) -> list[Decision]:
        """Those of the module."""
        return self.part.decisions(f"{path}.0", when)

    def write(self, path: str, site: Site) -> Site:
        """The module, the shortcut and their sum."""
        after = self.part.write(f"{path}.0", site)
        if after.shape[1:] != site.shape[1:]:
            raise SpaceError(
                f"what is in Residual keeps the size, {path}.0 makes {after.shape} of {site.shape}"
            )
        short = site
        if after.shape[0] != site.shape[0]:
            layer = nn.Conv2d(site.shape[0], after.shape[0], 1, bias=False)
            short = _after(site, f"{path}.short", [("conv", layer)], after.shape)
        wire = site.wired.add([after.wire, short.wire])
        return Site(site.wired, wire, after.shape, site.candidate)


# --- the family -------------------------------------------------------------------------------


class Language(Family):
    """The networks that an expression denotes, with the mean over positions and a linear layer
    behind it. `beside` are decisions of the same tree that no network has, such as a learning rate.
    """

    name = "language"

    def __init__(
        self,
        expression: Module,
        shape: Sequence[int],
        classes: int,
        beside: Iterable[Decision] = (),
    ) -> None:
        channels, height, width = shape
        self.expression, self.classes = expression, classes
        self.shape: Shape = (channels, height, width)
        self._space = Space([*beside, *expression.decisions("net", {})])

    @property
    def space(self) -> Space:
        """What the expression leaves open, and what is beside it."""
        return self._space

    def build(self, candidate: Candidate) -> nn.Module:
        """The network of a leaf."""
        wired = Wired()
        site = self.expression.write("net", Site(wired, wired.input, self.shape, candidate))
        head = [
            ("pool", nn.AdaptiveAvgPool2d(1)),
            ("flatten", nn.Flatten()),
            ("linear", nn.Linear(site.shape[0], self.classes)),
        ]
        return wired.network(wired.chain("head", head, site.wire), "Network")


def _open(make: Any, name: str, options: Any, when: When) -> list[Decision]:
    """The decision of a hyperparameter, where it has several options."""
    several = _options(options)
    return [make(name, *several, when=when)] if len(several) > 1 else []


def _option(name: str, options: Any, candidate: Candidate) -> Any:
    """The option that a candidate has, or the only one."""
    return candidate.get(name, _options(options)[0])


def _options(options: Any) -> tuple[Any, ...]:
    return tuple(options) if isinstance(options, (tuple, list, range)) else (options,)


def _after(site: Site, path: str, layers: list[tuple[str, nn.Module]], shape: Shape) -> Site:
    wire = site.wired.chain(path, layers, site.wire)
    return Site(site.wired, wire, shape, site.candidate)


def _renamed(part: Module, decided: str, path: str, site: Site) -> Site:
    """Writes a module at `path` with the options decided at another place."""
    moved = {
        f"{path}{name.removeprefix(decided)}" if name.startswith(f"{decided}.") else name: option
        for name, option in site.candidate.items()
    }
    there = part.write(path, Site(site.wired, site.wire, site.shape, Candidate(moved)))
    return Site(there.wired, there.wire, there.shape, site.candidate)
