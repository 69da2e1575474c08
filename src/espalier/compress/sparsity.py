"""Sparsity: weights set to zero, any of them or N of every M, by magnitude.

Masks are cut into the weights of the built model, nothing else changes: ONNX Runtime multiplies zeros
like any other number, so latency is that of the dense layer. What zeros save is room, where they are
not stored: see `StoredBytes`. N:M as in Mishra et al., 2021; magnitude as in Han et al., 2015.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from espalier.compress.cut import BoundCut, Cut, Ignored
from espalier.costs.cost import Builder, CodeCost
from espalier.costs.pieces import Piece, Terms, UnitFamily, pieces_of
from espalier.errors import EspalierError
from espalier.problem import Metric, Metrics
from espalier.space import Decision, Option, ordinal

_SPARSE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
NOTE = "zeros are multiplied like other numbers: latency does not change, stored bytes may"


@dataclass(frozen=True)
class Sparsity(Cut):
    """Each convolution and linear layer keeps a share of its weights, those of largest magnitude.

    - `patterns`: "N:M" keeps N of every M weights in a row along the input channels.
    - `shares`: shares of all the layer's weights kept, between 0 and 1, anywhere in it.
    - `layers`: patterns of module paths, as in `fnmatch`; all where it is None.

    A decision's options ascend by the share kept; the last, 1.0, keeps all. Depthwise convolutions
    have too few inputs for patterns and are left alone by them.
    """

    patterns: Sequence[str] = ("2:4",)
    shares: Sequence[float] = (0.5,)
    layers: Sequence[str] | None = None
    kind = "sparsity"

    def __post_init__(self) -> None:
        for pattern in self.patterns:
            kept, of = _numbers(pattern)
            if not 0 < kept < of:
                raise EspalierError(f"a pattern N:M keeps N of M, 0 < N < M, got {pattern!r}")
        for share in self.shares:
            if isinstance(share, bool) or not 0 < share < 1:
                raise EspalierError(f"a share of weights kept is between 0 and 1, got {share!r}")
        if not (self.patterns or self.shares):
            raise EspalierError("Sparsity needs patterns, like ('2:4',), or shares, like (0.5,)")

    def bind(self, model: nn.Module, example: Tensor) -> BoundSparsity:
        """The layers of a model. Errors: `EspalierError` when `layers` matches none."""
        options: dict[str, tuple[Option, ...]] = {}
        ignored = []
        owners: dict[int, str] = {}  # the first layer of those that share a weight decides for all
        for path, layer in model.named_modules():
            if not isinstance(layer, _SPARSE) or not self._allowed(path):
                continue
            first = owners.setdefault(id(layer.weight), path)
            if first != path:
                ignored.append(Ignored(path, self.kind, f"its weight is that of {first}"))
                continue
            inputs = layer.weight.shape[1]
            fits = [p for p in self.patterns if inputs >= _numbers(p)[1]]
            if fits or self.shares:
                every: list[Option] = [*fits, *self.shares]
                # at one share, weights anywhere in the layer can be better chosen than a pattern's
                every.sort(key=lambda o: (share(o), isinstance(o, float)))
                options[path] = (*every, 1.0)
            else:
                reason = f"{inputs} inputs are too few for {' or '.join(self.patterns)}"
                ignored.append(Ignored(path, "sparsity", reason))
        if self.layers is not None and not options:
            raise EspalierError(f"Sparsity(layers={list(self.layers)!r}) matches no layer")
        return BoundSparsity(options, ignored)

    def _allowed(self, path: str) -> bool:
        return self.layers is None or any(fnmatch(path, pattern) for pattern in self.layers)


class BoundSparsity(BoundCut):
    """The layers of one model that may be sparse."""

    note = NOTE

    def __init__(
        self, options: Mapping[str, tuple[Option, ...]], ignored: Sequence[Ignored] = ()
    ) -> None:
        self._layers = {path: (f"sparsity:{path}",) for path in options}
        self.decisions: tuple[Decision, ...] = tuple(
            ordinal(f"sparsity:{path}", *of) for path, of in options.items()
        )
        self.ignored = tuple(ignored)

    def apply(self, model: nn.Module, choices: Mapping[str, Option]) -> None:
        """Set weights to zero in every layer that is still there."""
        modules = dict(model.named_modules())
        for path, (name,) in self._layers.items():
            layer = modules.get(path)
            if isinstance(layer, _SPARSE) and choices[name] != 1.0:
                _mask(layer, choices[name])

    def layers(self) -> Mapping[str, tuple[str, ...]]:
        """Each layer -> its own decision."""
        return self._layers

    def slice(self, name: str, layer: nn.Module, choices: Mapping[str, Option]) -> nn.Module:
        """The layer with its mask."""
        option = choices.get(f"sparsity:{name}", 1.0)
        if option == 1.0 or not isinstance(layer, _SPARSE):
            return layer
        twin = copy.deepcopy(layer)
        _mask(twin, option)
        return twin


def share(option: Option) -> float:
    """The share of weights that an option keeps."""
    if isinstance(option, str):
        kept, of = _numbers(option)
        return kept / of
    return float(option)


def mask(weight: Tensor, option: Option) -> Tensor:
    """Which weights `(out, in, ...)` an option keeps: those of largest magnitude, the first of
    equals. A last group of fewer than M inputs keeps N of them."""
    size = weight.detach().abs()
    if not isinstance(option, str):
        kept = round(float(option) * size.numel())
        best = size.flatten().sort(descending=True, stable=True).indices[:kept]
        return torch.zeros(size.numel(), dtype=torch.bool).index_fill(0, best, True).view_as(size)
    n, m = _numbers(option)
    rows = size.movedim(1, -1)
    inputs = rows.shape[-1]
    padded = nn.functional.pad(rows, (0, -inputs % m), value=-1.0)
    groups = padded.reshape(*rows.shape[:-1], -1, m)
    best = groups.sort(dim=-1, descending=True, stable=True).indices[..., :n]
    kept_of = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True)
    return kept_of.flatten(-2)[..., :inputs].movedim(-1, 1)


def _mask(layer: nn.Module, option: Option) -> None:
    with torch.no_grad():
        weight: Any = layer.weight
        weight.mul_(mask(weight, option))


def _numbers(pattern: Any) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+):(\d+)", str(pattern))
    if not found:
        raise EspalierError(f"a pattern is N:M, like '2:4', got {pattern!r}")
    return int(found[1]), int(found[2])


def stored_bytes(weight: Tensor) -> int:
    """Bytes of a weight at 4 bytes a value where zeros are not stored: the least of dense, values
    with a bit for each place, and, where 2 of every 4 are kept at most, values with 2 bits each."""
    kept = int(torch.count_nonzero(weight))
    ways = [4 * weight.numel(), 4 * kept + -(-weight.numel() // 8)]
    if weight.dim() > 1 and bool((mask(weight, "2:4") | (weight == 0)).all()):
        ways.append(4 * kept + -(-kept // 4))
    return min(ways)


class StoredBytes(CodeCost):
    """Bytes of the weights where zeros of convolutions and linear layers are not stored.

    Everything else as in `costs.Counts`' bytes. A bound of what a format for sparse weights takes.
    """

    metrics = (Metric("stored_bytes", "B"),)

    def __init__(self, family: Builder) -> None:
        self.family = family
        self.space = family.space
        self._pieces = pieces_of(family)
        units = family.units() if isinstance(family, UnitFamily) else ()
        self._again = {unit.name for unit in units if getattr(unit, "turn", 0)}
        self._known: dict[tuple[str, Any], float] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return StoredBytes, (self.family,)

    def estimate_codes(self, codes: NDArray[Any]) -> Metrics:
        """The bytes of codes `(n, d)`."""
        total = np.zeros(len(codes))
        for part in self._pieces.parts(codes):
            total += part.values(np.array([self._of(p) for p in part.pieces], dtype=float))
        return Metrics({"stored_bytes": total}, self.metrics)

    def terms(self, metric: str) -> Terms:
        """The bytes of each piece, from which those of networks follow."""
        return Terms(self._pieces, self._of)

    def _of(self, piece: Piece) -> float:
        key = (piece.unit, piece.candidate)
        if key not in self._known:
            module, _ = self._pieces.make(piece)
            layers: list[Any] = [m for m in module.modules() if type(m) in _SPARSE]
            weights = {id(m.weight): m.weight for m in layers}  # tied ones once
            # the weights of a later call are those of the first, where they count
            now = [] if piece.unit in self._again else weights.values()
            saved = sum(4 * w.numel() - stored_bytes(w) for w in now)
            self._known[key] = float(piece.count.bytes - saved)
        return self._known[key]
