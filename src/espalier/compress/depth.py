"""Depth: blocks and residual branches that can be left out.

Which blocks a network can do without is the question of layer dropping, from residual networks that
behave like ensembles (Veit et al., 2016) to language models (FinerCut; Zhang et al., 2024).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

from torch import Tensor, nn

from espalier.compress.branches import removals
from espalier.compress.calls import follow
from espalier.compress.cut import BoundCut, Cut, Ignored
from espalier.compress.left_out import Removal
from espalier.errors import EspalierError
from espalier.space import Decision, ordinal
from espalier.space.options import Option


@dataclass(frozen=True)
class Depth(Cut):
    """Leaves out blocks: each decision is 1 (kept, the original) or 0 (left out).

    - A block with one residual branch whose input and output have the same shape becomes
      `nn.Identity`, so that an activation behind its addition goes with it.
    - A residual branch elsewhere (attention and the feed-forward part of a transformer's block,
      the first block of a stage) adds nothing: `x + f(x)` is `x`.
    - Other blocks, and convolutions and linear layers outside of blocks, become `nn.Identity`
      where input and output have the same shape.

    Within a block its blocks and residual branches are decided too, where it is kept itself. Each is
    tried on the example before it is offered. `layers`: patterns of the module paths that may be
    left out, as in `fnmatch`; all where it is None.
    """

    layers: Sequence[str] | None = None
    kind = "depth"

    def bind(self, model: nn.Module, example: Tensor) -> BoundDepth:
        """The blocks of a model. Errors: `EspalierError` where it does not run on the example."""
        run = follow(model, example)
        found, ignored = removals(model, run)
        kept = [r for r in found if self._allowed(r.name)]
        if self.layers is not None and not kept:
            names = ", ".join(r.name for r in found) or "none"
            raise EspalierError(
                f"Depth(layers={list(self.layers)!r}) matches no block that can be left out; "
                f"there are: {names}"
            )
        tried = []
        for offered in kept:
            removal, reason = offered.tried(model, example, run.output)
            if reason:
                ignored.append(Ignored(removal.name, "depth", reason))
            else:
                tried.append(removal)
        return BoundDepth(tried, ignored)

    def _allowed(self, name: str) -> bool:
        return self.layers is None or any(fnmatch(name, pattern) for pattern in self.layers)


class BoundDepth(BoundCut):
    """The blocks of one model that can be left out."""

    def __init__(self, found: Sequence[Removal], ignored: Sequence[Ignored] = ()) -> None:
        self._found = {f"depth:{removal.name}": removal for removal in found}
        self.decisions: tuple[Decision, ...] = tuple(ordinal(name, 0, 1) for name in self._found)
        self.ignored = tuple(ignored)
        self._layers: dict[str, tuple[str, ...]] = {}
        for name, removal in self._found.items():
            for path in removal.inside:
                self._layers[path] = (*self._layers.get(path, ()), name)

    def apply(self, model: nn.Module, choices: Mapping[str, Option]) -> None:
        """Leave out the blocks that are chosen to be."""
        for name, removal in self._found.items():
            if not choices[name]:
                removal.apply(model)

    def layers(self) -> Mapping[str, tuple[str, ...]]:
        """Layer, or module that holds layers -> the blocks it is in."""
        return self._layers

    def slice(self, name: str, layer: nn.Module, choices: Mapping[str, Option]) -> nn.Module | None:
        """The layer itself, or None within a block that is left out."""
        return layer if all(choices[d] for d in self._layers.get(name, ())) else None
