"""A supernet: one module that holds the weights of every candidate of its space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from torch import Tensor, fx, nn

from espalier.errors import DataError, SpaceError
from espalier.nets.collect import Layers, blend, collect, layers, mixable, settle
from espalier.nets.elastic.dims import Choices, options
from espalier.nets.elastic.mixing import Mixture
from espalier.nets.family import Family
from espalier.nets.plain import plain
from espalier.nets.units import Unit, Units
from espalier.space import Candidate, Constraint, Option, Real, Space


def check_input(shape: Sequence[int], classes: int) -> tuple[int, int, int]:
    """The shape of one image as three whole numbers. Errors: `DataError`."""
    sides = tuple(shape) if isinstance(shape, Sequence) and not isinstance(shape, str) else ()
    if len(sides) != 3 or any(isinstance(n, bool) or n != int(n) or n < 1 for n in sides):
        raise DataError(
            f"a shape is three positive whole numbers (channels, height, width), got {shape!r}"
        )
    if isinstance(classes, bool) or classes != int(classes) or classes < 2:
        raise DataError(f"classes must be a whole number of at least 2, got {classes!r}")
    return int(sides[0]), int(sides[1]), int(sides[2])


class Supernet(nn.Module, Family):
    """Base of networks made of elastic modules. Subclass it, put modules in it, and that is all.

    The space is read off the modules. `forward` runs the children one after the other; write your
    own where that is not what you want, but let no Python condition in it hang on a tensor.

    `shape` is one input `(channels, height, width)`, without its batch dimension.
    """

    constraints: tuple[Constraint, ...] = ()
    # of cells: the name of a node, and the decisions whose outputs are summed there
    joins: Mapping[str, tuple[str, ...]] = MappingProxyType({})

    def __init__(self, shape: Sequence[int], classes: int) -> None:
        super().__init__()
        self.shape = check_input(shape, classes)
        self.classes = int(classes)
        self.name = type(self).__name__.lower()
        self._active: Candidate | None = None
        self._mixing: frozenset[str] = frozenset()  # the decisions that are mixed
        self._forget()

    def _forget(self) -> None:
        """Drops what was worked out from the modules; it is worked out again when asked for."""
        self._space: Space | None = None
        self._layers: Layers | None = None
        self._units: Units | None = None

    def __getstate__(self) -> dict[str, Any]:
        # what can be worked out again is neither pickled nor copied
        # mixtures aren't either: a copy runs what is active until it is told to mix
        forgotten: dict[str, Any] = {
            "_space": None,
            "_layers": None,
            "_units": None,
            "_mixing": frozenset(),
        }
        return {**self.__dict__, **forgotten}

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module) and callable(getattr(Supernet, name, None)):
            raise SpaceError(
                f"a supernet has a method {name!r}, so none of its modules can have that name:"
                " name it otherwise"
            )
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x)
        return x

    @property
    def space(self) -> Space:
        """The decisions that the modules declare, with their conditions, and `constraints`."""
        if self._space is None:
            self._space = Space(collect(self), self.constraints)
        return self._space

    @property
    def active(self) -> Candidate | None:
        """What `forward` runs; None before the first `activate`, when it runs the largest."""
        return self._active

    def activate(self, candidate: Mapping[str, Option]) -> None:
        """Makes `forward` run `candidate`, in place. Errors: `SpaceError` where it is not valid."""
        known = self._checked(candidate)
        if self._mixing:
            self._end_mixture()
        settle(self._elastic(), known.to_json())
        self._active = known

    @property
    def mixable(self) -> tuple[str, ...]:
        """The decisions that `mix` takes, in the order of the space."""
        able = mixable(self._elastic())
        return tuple(name for name in self.space.names if name in able)

    def mix(self, weights: Mixture) -> None:
        """Makes `forward` run a mixture, until the next `mix` or `activate`.

        `weights` maps decisions of `mixable` to a weight an option, `(options,)`, or one for each
        sample, `(batch, options)`; gradients reach them. They need not add up to 1. An option of
        weight 0 is not run, so one-hot weights give what `activate` gives, at its price. Decisions
        that are left out stay as activated; those inactive there, and all before the first
        `activate`, at their last option.
        Outputs of modules are weighted sums. Sizes run at the largest, and channels are masked.
        Errors: `SpaceError` for an unknown decision, one that can't be mixed, or other weights.
        """
        if weights.keys() != self._mixing:
            self._end_mixture()
        self._mixing = frozenset(weights)
        try:
            blend(self._elastic(), weights, self.space.decisions)
        except SpaceError:
            self._end_mixture()
            raise

    def _end_mixture(self) -> None:
        settle(self._elastic(), self._everything())
        self._mixing = frozenset()

    def _everything(self) -> Choices:
        """What is active, with the last option of each inactive decision: a mixture may run it."""
        last = {d.name: options(d)[-1] for d in self.space.decisions}
        return {**last, **(self._active or {})}

    def _checked(self, candidate: Mapping[str, Option]) -> Candidate:
        """The candidate, if it is one of this space: exactly its active decisions, valid options.

        Checked here and not by the space when it is right, because this is on the hot path.
        """
        space = self.space
        if not isinstance(candidate, Candidate):
            return space.candidate(candidate)
        given = candidate.to_json()
        known = 0
        for decision in space.decisions:
            name = decision.name
            if all(given.get(parent) in allowed for parent, allowed in decision.when.items()):
                if name not in given:
                    return space.candidate(candidate)  # which says what is wrong
                decision.code(given[name])
                known += 1
        return candidate if known == len(given) else space.candidate(candidate)

    def _elastic(self) -> Layers:
        if self._layers is None:
            self._layers = layers(self)
        return self._layers

    def extract(self, candidate: Mapping[str, Option] | None = None) -> fx.GraphModule:
        """A plain network with copies of the weights that `candidate` (or the active one) uses.

        Its modules are torch's own, its names those of this module. The supernet stays as it is.
        Errors: `ExportError` where torch.fx can't trace a forward.
        """
        return self._plain(candidate if candidate is not None else self._running(), fresh=False)

    def build(self, candidate: Mapping[str, Option]) -> fx.GraphModule:
        """A plain network as `extract` gives, in training mode, with fresh random weights.

        They come from torch's global generator: seed it.
        """
        return self._plain(candidate, fresh=True).train()

    def _running(self) -> Candidate:
        return self._active if self._active is not None else self.uniform(1.0)

    def _plain(self, candidate: Mapping[str, Option], fresh: bool) -> fx.GraphModule:
        network = plain(self, self._checked(candidate), fresh)
        assert isinstance(network, fx.GraphModule)  # a Supernet is never torch's own class
        return network

    def uniform(self, scale: float) -> Candidate:
        """The family scaled by hand: every decision at the same relative position, 0 to 1.

        0 is the first option of each decision, 1 the last. Constraints are not looked at.
        """
        if not 0 <= scale <= 1:
            raise SpaceError(f"a scale is a number from 0 to 1, got {scale!r}")
        row: list[float] = []
        for decision in self.space.decisions:
            if isinstance(decision, Real):
                row.append(decision.low + scale * (decision.high - decision.low))
            else:
                row.append(round(scale * (decision.count - 1)))
        codes = np.array([row], dtype=self.space.dtype)
        return self.space.decode(self.space.canonical(codes))[0]

    def units(self) -> list[Unit]:
        """The additive pieces of the network: what cost tables are made of.

        Blocks of a `Repeat` and other children of the root; the whole network as one, where its
        forward does not call each of them once with one tensor.
        """
        return list(self._pieces().units())

    def unit(
        self, name: str, candidate: Mapping[str, Option]
    ) -> tuple[nn.Module, tuple[int, ...]] | None:
        """One piece as a plain module and the shape of its input, without the batch dimension.

        None where `candidate` does not run it, or where nothing is left of it.
        """
        return self._pieces().unit(name, self._checked(candidate))

    def _pieces(self) -> Units:
        if self._units is None:
            self._units = Units(self)
        return self._units
