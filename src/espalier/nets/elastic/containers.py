"""Modules that run some of their children: how many, whether, and which one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice

from torch import Tensor, nn

from espalier.errors import SpaceError
from espalier.nets.elastic.core import Elastic, Maker, When
from espalier.nets.elastic.dims import Choices, options
from espalier.nets.elastic.mixing import Mixed, Weights, added, no_gates, resolve, weighted
from espalier.space import Decision, Option, Real


class Repeat(Elastic):
    """Runs the first `depth` of its blocks, one after the other.

    `block(i)` makes block `i`, from 0 to the largest depth less one. Decisions inside block `i`
    are active only under depths greater than `i`.
    """

    def __init__(self, depth: int | Decision, block: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.depth = depth
        self._depths = _depths(depth)
        for index in range(max(self._depths)):
            self.add_module(str(index), block(index))
        self._running = max(self._depths)

    def __len__(self) -> int:
        return len(self._modules)

    def decisions(self) -> tuple[Decision, ...]:
        return () if isinstance(self.depth, int) else (self.depth,)

    def branches(self) -> Iterator[tuple[nn.Module, When]]:
        for index, child in enumerate(self.children()):
            if isinstance(self.depth, int) or index < min(self._depths):
                yield child, {}
            else:
                yield child, {self.depth.name: tuple(n for n in self._depths if n > index)}

    def _number(self, choices: Choices) -> int:
        return self.depth if isinstance(self.depth, int) else int(choices[self.depth.name])

    def settle(self, choices: Choices) -> None:
        self._running = self._number(choices)
        if self._mixed is not None:
            self._mixed = None

    def mix(self, weights: Mapping[str, Weights]) -> None:
        found = resolve(weights, self.decisions())
        no_gates(found.values(), found)
        for mixed in found.values():
            self._mixed = mixed

    def _mixture(self, x: Tensor, mixed: Mixed) -> Tensor:
        """The sum over depths of weight times what that many blocks give; each block runs once."""
        live = {self._depths[i]: i for i in mixed.live}
        out = mixed.times(live[0], x) if 0 in live else None
        for depth, child in enumerate(islice(self._modules.values(), max(live)), 1):
            assert child is not None
            x = child(x)
            if depth in live:
                term = mixed.times(live[depth], x)
                out = term if out is None else added(out, term)
        assert out is not None
        return out

    def forward(self, x: Tensor) -> Tensor:
        if self._mixed is not None:
            return self._mixture(x, self._mixed)
        for child in islice(self._modules.values(), self._running):
            assert child is not None
            x = child(x)
        return x

    def plain(self, make: Maker) -> nn.Module:
        return nn.Sequential(*map(make, islice(self.children(), self._number(make.choices))))


def _depths(depth: int | Decision) -> tuple[int, ...]:
    found = (depth,) if isinstance(depth, int) else options(depth)
    whole = [n for n in found if isinstance(n, int) and not isinstance(n, bool) and n >= 0]
    if len(whole) != len(found) or isinstance(depth, Real) or max(whole) < 1:
        name = "depth" if isinstance(depth, int) else f"decision {depth.name!r}"
        raise SpaceError(
            f"Repeat needs whole depths of 0 or more, the largest at least 1; {name} has"
            f" {', '.join(map(str, found))}"
        )
    return tuple(whole)


class Skippable(Elastic):
    """Runs its module where the decision is true, and gives its input back where it is false.

    Write the decision as `choice(name, False, True)`: the last options make the largest network,
    which supernet training teaches the others by.
    """

    def __init__(self, decision: Decision, module: nn.Module) -> None:
        super().__init__()
        self.decision = decision
        self.module = module
        self._kept = tuple(option for option in options(decision) if _true(option))
        if not 0 < len(self._kept) < len(options(decision)):
            raise SpaceError(
                f"Skippable needs a decision between True and False, {decision.name!r} has"
                f" {', '.join(map(repr, options(decision)))}"
            )
        self._runs = True

    def decisions(self) -> tuple[Decision, ...]:
        return (self.decision,)

    def branches(self) -> Iterator[tuple[nn.Module, When]]:
        yield self.module, {self.decision.name: self._kept}

    def settle(self, choices: Choices) -> None:
        self._runs = _true(choices[self.decision.name])
        if self._mixed is not None:
            self._mixed = None

    def mix(self, weights: Mapping[str, Weights]) -> None:
        for mixed in resolve(weights, self.decisions()).values():
            self._mixed = mixed

    def forward(self, x: Tensor) -> Tensor:
        if self._mixed is not None:
            return weighted(self._mixed, self._by_index(), x)
        return self.module(x) if self._runs else x

    def _by_index(self) -> dict[int, nn.Module | None]:
        every = options(self.decision)
        return {i: self.module if _true(option) else None for i, option in enumerate(every)}

    def plain(self, make: Maker) -> nn.Module:
        runs = _true(make.choices[self.decision.name])
        return make(self.module) if runs else nn.Identity()


def _true(option: Option) -> bool:
    return bool(option)


class OneOf(Elastic):
    """Runs the one of its modules that the decision names: `OneOf(decision, {option: module})`.

    Name the largest last: the last options make the network that supernet training teaches by.
    """

    def __init__(self, decision: Decision, modules: Mapping[Option, nn.Module]) -> None:
        super().__init__()
        self.decision = decision
        self._names = {option: _attribute(option) for option in modules}
        if set(modules) != set(options(decision)):
            raise SpaceError(
                f"OneOf needs a module for each option of {decision.name!r}"
                f" ({', '.join(map(str, options(decision)))}), got {', '.join(map(str, modules))}"
            )
        for option, module in modules.items():
            self.add_module(self._names[option], module)
        self._chosen = self._names[options(decision)[-1]]

    def decisions(self) -> tuple[Decision, ...]:
        return (self.decision,)

    def branches(self) -> Iterator[tuple[nn.Module, When]]:
        for option, name in self._names.items():
            yield self.get_submodule(name), {self.decision.name: (option,)}

    def settle(self, choices: Choices) -> None:
        self._chosen = self._names[choices[self.decision.name]]
        if self._mixed is not None:
            self._mixed = None

    def mix(self, weights: Mapping[str, Weights]) -> None:
        for mixed in resolve(weights, self.decisions()).values():
            self._mixed = mixed

    def _by_index(self) -> dict[int, nn.Module | None]:
        every = options(self.decision)
        return {i: self._modules[self._names[option]] for i, option in enumerate(every)}

    def forward(self, x: Tensor) -> Tensor:
        if self._mixed is not None:
            return weighted(self._mixed, self._by_index(), x)
        module = self._modules[self._chosen]
        assert module is not None
        out: Tensor = module(x)
        return out

    def plain(self, make: Maker) -> nn.Module:
        return make(self.get_submodule(self._names[make.choices[self.decision.name]]))


def _attribute(option: Option) -> str:
    return f"is_{option}".replace(".", "_")
