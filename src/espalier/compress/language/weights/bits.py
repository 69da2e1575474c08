"""Bits of a transformer's weights: whole numbers with a scale a block of inputs, activations float."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from espalier.compress.cut import Cut
from espalier.compress.language.anatomy import anatomy
from espalier.compress.language.weights.calibrated import BoundPlaces, asked, check_inputs
from espalier.compress.language.weights.places import places
from espalier.compress.language.weights.rounding import (
    BLOCK,
    HALF,
    METHODS,
    Packed,
    packed_bytes,
    repack,
)
from espalier.errors import EspalierError, unknown
from espalier.export.quantisers import FLOAT
from espalier.space.options import Option


@dataclass(frozen=True)
class WeightBits(Cut):
    """How many bits the weights of each place have: "bits:model.layers.3.qkv", ".out", ".up" (with
    the gate), ".down", ".experts" (all of a layer's), and with `tables` the embedding and the head.

    - `options`: bits to choose from, 2 to 8, 16 (plain floats) and 32, the original, always among
      them. The model in memory holds the rounded values; bytes are those of the packed form.
    - `method`: "error" (column by column, errors compensated), "aware" (inputs scaled) or "nearest".
    - `block`: inputs that share a scale.
    - `inputs`: "changed" (a place sees what the changed places before it give) or "original" (looked
      at once; an option's weights are made once and kept).
    - `layers`: patterns of places, as in `fnmatch`; all by default.
    - `calibration`: inputs of the model `(n, ...)`; by default the example it is bound with.
    """

    kind: ClassVar[str] = "bits"
    options: tuple[int, ...] = (3, 4, 8, FLOAT)
    method: str = "error"
    block: int = BLOCK
    inputs: str = "changed"
    tables: bool = False
    layers: Sequence[str] | None = None
    calibration: Tensor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        given = tuple(sorted({*self.options, FLOAT}))
        valid = (*range(2, 9), HALF, FLOAT)
        wrong = [b for b in given if isinstance(b, bool) or b not in valid]
        if wrong or len(given) < 2:
            what = f"got {wrong[0]!r}" if wrong else "got none"
            raise EspalierError(f"bits are whole numbers from 2 to 8, 16, or 32 as it is; {what}")
        object.__setattr__(self, "options", given)
        if self.method not in METHODS:
            raise EspalierError(unknown("way to round weights", self.method, METHODS))
        if isinstance(self.block, bool) or self.block < 8 or self.block & (self.block - 1):
            raise EspalierError(f"a block is a power of 2 from 8 on, got {self.block!r}")
        check_inputs(self.inputs)

    def bind(self, model: nn.Module, example: Tensor) -> BoundWeightBits:
        """The places of a `transformers` model. Errors: `EspalierError`."""
        found = asked(model, self.tables, self.layers)
        windows = example if self.calibration is None else self.calibration
        return BoundWeightBits(self, model, found, windows)


class BoundWeightBits(BoundPlaces):
    """The bits of one model's weights."""

    kind = WeightBits.kind

    def __init__(
        self, cut: WeightBits, model: nn.Module, found: Mapping[str, Any], windows: Tensor
    ) -> None:
        self.cut = cut
        options = dict.fromkeys(found, cut.options)
        super().__init__(model, found, options, windows, cut.inputs, cut.tables)

    @property
    def note(self) -> str:
        """Which options no kernel of ONNX Runtime has."""
        odd = [b for b in self.cut.options if b not in (4, 8, HALF, FLOAT)]
        if not odd:
            return ""
        few = " and ".join(map(str, odd))
        return f"{few} bits are counted as packed; ONNX Runtime's kernels have 4 and 8"

    def needs_inputs(self, option: Option) -> bool:
        """Whether rounding looks at the inputs."""
        bits: Any = option
        return bool(self.cut.method != "nearest" and bits < HALF)

    def treat(self, weight: Tensor, gram: Tensor | None, option: Option) -> Tensor:
        """The rounded weights."""
        bits: Any = option
        if bits >= HALF:
            return weight.half().float() if bits == HALF else weight
        method = "nearest" if gram is None else self.cut.method
        return METHODS[method](weight, gram, bits, self.cut.block).values()

    def bytes_of(self, name: str, option: Option) -> int:
        """Bytes of a decision's weights, in the bound model's shapes, at an option; 32 is 4 bytes."""
        bits: Any = option
        size = sum(packed_bytes(shape, bits, self.cut.block) for shape in self.shapes(name))
        place = self.places[name.partition(":")[2]]
        if self.cut.method == "aware" and bits < HALF and not place.table:
            factors = self.shapes(name) if place.experts else self.shapes(name)[:1]
            size += sum(4 * (s[0] if len(s) > 2 else 1) * s[-1] for s in factors)
        return size

    def packed(self, model: nn.Module, choices: Mapping[str, Option]) -> dict[str, Packed]:
        """Whole numbers and scales of the weights of a built model, by parameter (its path): what
        is written into files; matrices are `(out, in)`, also where the module keeps them turned.

        Errors: `EspalierError` with the method "aware", whose levels differ from input to input.
        """
        if self.cut.method == "aware":
            raise EspalierError("weights rounded by 'aware' can't be packed: use 'error'")
        chosen: dict[str, Any] = self._chosen(choices)
        return pack(model, {n: b for n, b in chosen.items() if b < HALF}, self.cut)


def pack(model: nn.Module, bits: Mapping[str, int], cut: WeightBits) -> dict[str, Packed]:
    """Parameter (path) -> packed form, of places (by name) that have so many bits."""
    now = places(anatomy(model), cut.tables)
    found: dict[str, Packed] = {}
    for name, own in bits.items():
        for path, weight in _parameters(model, now[name]) if name in now else ():
            found[path] = repack(weight, own, cut.block)
    return found


def _parameters(model: nn.Module, place: Any) -> Iterable[tuple[str, Tensor]]:
    if place.experts:
        return [(f"{place.module}.{part}", w) for part, w in place.read(model).items()]
    turned = {w.path: w.flipped for w in place.weights}
    own: dict[str, Any] = {path: model.get_submodule(path) for path in turned}
    return [
        (f"{path}.weight", own[path].weight.t() if flipped else own[path].weight)
        for path, flipped in turned.items()
    ]
