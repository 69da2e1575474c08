"""Reads the decisions off a tree of modules, with the conditions under which each is active."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from torch import nn

from espalier.errors import SpaceError
from espalier.nets.elastic.core import Elastic, When
from espalier.nets.elastic.dims import Choices, options
from espalier.nets.elastic.mixing import Mixture, resolve
from espalier.space import Decision


def collect(root: nn.Module) -> tuple[Decision, ...]:
    """The decisions in the order in which they are met, conditions in `when`.

    Conditions add up on the way down; a decision met in several places is active where any of
    them is, as far as one condition can say that, else always.
    """
    first: dict[str, Decision] = {}
    found: dict[str, list[When]] = {}
    for decision, when in _places(root, {}):
        known = first.setdefault(decision.name, decision)
        if known != decision:
            raise SpaceError(
                f"decision {decision.name!r} is declared twice, with different options: declare it"
                " once and pass it to both, or name one of them otherwise"
            )
        found.setdefault(decision.name, []).append(when)
    every = {name: options(decision) for name, decision in first.items()}
    return tuple(
        replace(decision, when=_any(found[name], every)) for name, decision in first.items()
    )


def _places(module: nn.Module, when: When) -> Iterator[tuple[Decision, When]]:
    if not isinstance(module, Elastic):
        for child in module.children():
            yield from _places(child, when)
        return
    for decision in module.decisions():
        own = _both(when, decision.when)
        if own is not None:
            yield decision, own
            when = own if any(True for _ in module.branches()) else when
    for child, condition in module.branches():
        inner = _both(when, condition)
        if inner is not None:
            yield from _places(child, inner)


def _both(a: Mapping[str, tuple[object, ...]], b: Mapping[str, tuple[object, ...]]) -> When | None:
    """Both conditions at once; None where they can't hold together."""
    out: When = dict(a)  # type: ignore[arg-type]
    for name, allowed in b.items():
        kept = tuple(option for option in out.get(name, allowed) if option in allowed)
        if not kept:
            return None
        out[name] = kept  # type: ignore[assignment]
    return out


def _any(places: list[When], every: Mapping[str, tuple[object, ...]]) -> When:
    """One condition that holds where any of several does; always, where none says just that."""
    left: list[When] = []
    for place in places:
        if place not in left:
            left.append(place)
    merged = True
    while merged and len(left) > 1:
        merged = False
        for i in range(len(left)):
            for j in range(i + 1, len(left)):
                joined = _joined(left[i], left[j], every)
                if joined is not None:
                    left[i] = joined
                    del left[j]
                    merged = True
                    break
            if merged:
                break
    return left[0] if len(left) == 1 else {}


def _joined(a: When, b: When, every: Mapping[str, tuple[object, ...]]) -> When | None:
    """The condition of a or b, if it is one: they differ in one name, or one holds the other."""
    for wide, narrow in ((a, b), (b, a)):
        if all(n in narrow and set(narrow[n]) <= set(allowed) for n, allowed in wide.items()):
            return wide
    differ = [n for n in {*a, *b} if set(a.get(n, ())) != set(b.get(n, ()))]
    if len(differ) != 1 or differ[0] not in a or differ[0] not in b:
        return None
    name = differ[0]
    union = tuple(o for o in every.get(name, (*a[name], *b[name])) if o in (*a[name], *b[name]))
    return {**a, name: union}


Layers = list[tuple[Elastic, tuple[str, ...]]]


def layers(root: nn.Module) -> Layers:
    """Every elastic module that a decision acts on, with the names of those decisions."""
    found = [m for m in root.modules() if isinstance(m, Elastic)]
    named = [(m, tuple(d.name for d in m.decisions())) for m in found]
    return [(m, names) for m, names in named if names]


def settle(found: Layers, choices: Choices) -> None:
    """Puts a choice into effect. What is inactive under it is left as it was, and is not run."""
    for module, names in found:
        if all(name in choices for name in names):
            module.settle(choices)


def mixable(found: Layers) -> set[str]:
    """The decisions that every module on which they act can mix."""
    able = [(names, module.mixable()) for module, names in found]
    every = {name for names, _ in able for name in names}
    return every - {name for names, takes in able for name in names if name not in takes}


def blend(found: Layers, weights: Mixture, decisions: Iterable[Decision]) -> None:
    """Puts a mixture into effect. What it does not name stays as it is."""
    mixture = resolve(weights, decisions)
    for module, names in found:
        own = {name: mixture[name] for name in names if name in mixture}
        if own:
            module.mix(own)
