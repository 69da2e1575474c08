"""What cuts on the shape of a transformer share."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from espalier.compress.cut import BoundCut, Ignored
from espalier.compress.language.anatomy import Anatomy, Experts, Layer, anatomy
from espalier.errors import EspalierError
from espalier.space import Constraint, Decision
from espalier.space.options import Option

Choices = Mapping[str, Option]


class BoundShape(BoundCut):
    """Decisions on the shape of one model, by layer. `reach`: module path -> its decisions."""

    def __init__(
        self,
        model: nn.Module,
        decisions: Iterable[Decision],
        reach: Mapping[str, tuple[str, ...]],
        constraints: Iterable[Constraint] = (),
        ignored: Iterable[Ignored] = (),
    ) -> None:
        self.model, self.decisions = model, tuple(decisions)
        self.constraints, self.ignored = tuple(constraints), tuple(ignored)
        self._reach = dict(reach)

    def layers(self) -> Mapping[str, tuple[str, ...]]:
        """Leaf module -> the decisions that decide its shape, or whether it runs."""
        return self._reach

    def slice(self, name: str, layer: nn.Module, choices: Choices) -> nn.Module | None:
        """One module as `apply` would leave it; None where it is gone."""
        twin = copy.deepcopy(self.model)
        twin.set_submodule(name, copy.deepcopy(layer))
        self.apply(twin, {d.name: d.options[-1] for d in self.decisions} | dict(choices))
        try:
            found = twin.get_submodule(name)
        except AttributeError:
            return None
        return found if any(True for _ in found.parameters()) else None

    def places_of(self, choices: Choices) -> Iterable[tuple[int, Layer, str, Any]]:
        """(number, layer, kind, option) of every decision that is not the original's."""
        layers = {layer.path: (i, layer) for i, layer in enumerate(anatomy(self.model).layers)}
        for decision in self.decisions:
            kind, _, path = decision.name.partition(":")
            option = choices.get(decision.name, decision.options[-1])
            if option != decision.options[-1] and path in layers:
                yield *layers[path], kind, option


def stepped(whole: int, steps: int, multiple: int, given: Sequence[int] | None) -> tuple[int, ...]:
    """Widths to choose from, ascending, the last the whole. Errors: `EspalierError`."""
    if given is None:
        given = [whole * i / steps for i in range(1, steps)]  # type: ignore[misc]
    found = {max(multiple, multiple * round(w / multiple)) for w in given}
    for width in found:
        if width < 1:
            raise EspalierError(f"a width is 1 or more, got {width}")
    return (*sorted(w for w in found if w < whole), whole)


def chosen_layers(parts: Anatomy, only: Sequence[int] | None) -> list[tuple[int, Layer]]:
    numbers = range(len(parts.layers)) if only is None else only
    for i in numbers:
        if not 0 <= i < len(parts.layers):
            raise EspalierError(f"layers are 0 to {len(parts.layers) - 1}, got {i}")
    return [(i, parts.layers[i]) for i in numbers]


def inside(parts: Anatomy, layer: Layer, part: str) -> list[str]:
    """Paths of the modules with weights that a sub-layer is."""
    found: list[str] = []
    if part == "attention" and layer.attention is not None:
        a = layer.attention
        found = [w.path for w in (a.query, a.key, a.value, a.out)]
    elif isinstance(layer.feed, Experts):
        found = [layer.feed.router, f"{layer.feed.path}.experts"]
        if (shared := layer.feed.shared) is not None:
            found += [w.path for w in (shared.up, shared.gate, shared.down) if w is not None]
    elif part == "feed" and layer.feed is not None:
        found = [w.path for w in (layer.feed.up, layer.feed.gate, layer.feed.down) if w]
    return list(dict.fromkeys(found))
