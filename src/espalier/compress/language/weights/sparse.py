"""Zeros in a transformer's weights: any of them or N of every M, the others moved in closed form."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from espalier.compress.cut import Cut, Ignored
from espalier.compress.language.weights.calibrated import BoundPlaces, asked, check_inputs
from espalier.compress.language.weights.places import Place
from espalier.compress.language.weights.rounding import BLOCK, HALF, packed_bytes
from espalier.compress.removal import METHODS
from espalier.compress.sparsity import NOTE, Sparsity, share
from espalier.errors import EspalierError, unknown
from espalier.space.options import Option


@dataclass(frozen=True)
class SparseWeights(Cut):
    """Each place keeps a share of its weights: "sparsity:model.layers.3.qkv", places as `WeightBits`'.

    - `patterns`: "N:M" keeps N of every M weights in a row along the inputs.
    - `shares`: shares of the weights kept, between 0 and 1, anywhere in a place.
    - `method`: "apt" (many at once, the others at the optimum), "sparsegpt", "wanda", "magnitude".
    - `inputs`, `layers`, `calibration`: as of `WeightBits`.

    A decision's options ascend by the share kept; the last, 1.0, keeps all.
    """

    kind: ClassVar[str] = "sparsity"
    patterns: Sequence[str] = ("2:4",)
    shares: Sequence[float] = (0.5,)
    method: str = "apt"
    inputs: str = "changed"
    layers: Sequence[str] | None = None
    calibration: Tensor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        Sparsity(self.patterns, self.shares)  # the same settings, refused in the same words
        if self.method not in METHODS:
            raise EspalierError(unknown("way to remove weights", self.method, METHODS))
        check_inputs(self.inputs)

    def bind(self, model: nn.Module, example: Tensor) -> BoundSparse:
        """The places of a `transformers` model. Errors: `EspalierError`."""
        windows = example if self.calibration is None else self.calibration
        return BoundSparse(self, model, asked(model, patterns=self.layers), windows)


class BoundSparse(BoundPlaces):
    """The sparsity of one model's weights."""

    kind = SparseWeights.kind

    def __init__(
        self, cut: SparseWeights, model: nn.Module, found: Mapping[str, Place], windows: Tensor
    ) -> None:
        self.cut = cut
        options: dict[str, tuple[Option, ...]] = {}
        ignored = []
        for name, place in found.items():
            inputs = {shape[-1] for shape in place.shapes(model)}
            fits = [p for p in cut.patterns if not any(d % _of(p) for d in inputs)]
            if fits or cut.shares:
                every: list[Option] = [*fits, *cut.shares]
                # at one share, weights anywhere can be better chosen than a pattern's
                every.sort(key=lambda o: (share(o), isinstance(o, float)))
                options[name] = (*every, 1.0)
            else:
                reason = f"{max(inputs)} inputs are not whole groups of {' or '.join(cut.patterns)}"
                ignored.append(Ignored(name, self.kind, reason))
        super().__init__(model, found, options, windows, cut.inputs, False, ignored)

    @property
    def note(self) -> str:
        """What sparse weights do not do."""
        return NOTE

    def needs_inputs(self, option: Option) -> bool:
        """Whether the choice of weights looks at inputs."""
        return self.cut.method != "magnitude"

    def treat(self, weight: Tensor, gram: Tensor | None, option: Option) -> Tensor:
        """The weights that are left, each matrix of a stack by itself."""
        kept: Any = option
        method = METHODS[self.cut.method]
        eye = torch.eye(weight.shape[-1], dtype=torch.float64, device=weight.device)
        if weight.dim() == 2:
            return method(weight, eye if gram is None else gram, kept)
        each = [eye] * len(weight) if gram is None else list(gram)
        return torch.stack([method(w, g, kept) for w, g in zip(weight, each, strict=True)])

    def bytes_of(self, name: str, option: Option) -> int:
        """Bytes of a decision's weights at an option, values of 4 bytes: see `sparse_bytes`."""
        return sum(sparse_bytes(shape, option) for shape in self.shapes(name))


def sparse_bytes(
    weight: Tensor | Sequence[int], kept: Option, bits: int = 32, block: int = BLOCK
) -> int:
    """Bytes of a weight of that shape of which a pattern or share is kept, values of `bits` bits.

    Values that are kept and where they are: 2 bits each in 2:4, otherwise a bit for every place;
    scales as without zeros. Dense where that is less.
    """
    shape = tuple(weight.shape) if isinstance(weight, Tensor) else tuple(weight)
    dense = packed_bytes(shape, bits, block)
    if kept == 1.0:
        return dense
    total = math.prod(shape)
    values = math.ceil(total * share(kept))
    where = 2 * values if kept == "2:4" else total
    scales = (
        0 if bits >= HALF else packed_bytes(shape, bits, block) - packed_codes(shape, bits, block)
    )
    return min(dense, -(-values * bits // 8) + -(-where // 8) + scales)


def packed_codes(shape: Sequence[int], bits: int, block: int) -> int:
    """Bytes of the whole numbers alone, without scales."""
    *rows, inputs = shape
    return math.prod(rows) * -(-inputs // block) * -(-block * bits // 8)


def _of(pattern: str) -> int:
    return int(pattern.partition(":")[2])
