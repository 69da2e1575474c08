"""Bits a layer: each convolution and linear layer in float, or in integers of fewer bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from espalier.compress.calls import Pass, follow
from espalier.compress.cut import BoundCut, Cut, Ignored
from espalier.compress.ranges import calibrate
from espalier.compress.rounding import outputs_to_round
from espalier.errors import EspalierError, unknown
from espalier.export.placing import put
from espalier.export.quantisers import (
    BLOCK,
    FLOAT,
    Quantised,
    plain_kind,
    quantised,
    round_output,
)
from espalier.space import ordinal
from espalier.space.options import Option


@dataclass(frozen=True)
class Bits(Cut):
    """How many bits each layer's weights have: a decision "bits:layer" for each.

    - `options`: bits to choose from, 32 (float) always among them. With 8, a layer computes on
      integers: unsigned activations with a scale a tensor, signed weights with one a channel, as
      ONNX Runtime's kernels do. Fewer bits are simulated: weights on fewer levels, kept in 8 bits
      where the network runs, so bytes are counted as if packed and latency is that of 8 bits.
    - `weights_only`: linear layers' weights alone, in blocks of 32 inputs with a scale each;
      activations stay float. 4 and 8 bits are packed in ONNX, 2 and 3 bits lie in 4.
    - `layers`: paths of the layers to decide; all by default.
    - `calibration`: inputs `(n, ...)` that activations' ranges are taken from; without them the
      example's, which only tells latency and bytes.
    """

    kind: ClassVar[str] = "bits"
    options: tuple[int, ...] = (8, FLOAT)
    weights_only: bool = False
    layers: Sequence[str] | None = None
    calibration: Tensor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        given = tuple(sorted({*self.options, FLOAT}))
        wrong = [b for b in given if isinstance(b, bool) or b not in (*range(2, 9), FLOAT)]
        if wrong or len(given) < 2:
            what = f"got {wrong[0]!r}" if wrong else "got none"
            raise EspalierError(f"bits are whole numbers from 2 to 8, or 32 for float; {what}")
        object.__setattr__(self, "options", given)
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))

    def bind(self, model: nn.Module, example: Tensor) -> BoundBits:
        """The layers of a model that can have fewer bits. Errors: `EspalierError`."""
        run = follow(model, example[:1])
        modules = dict(model.named_modules())
        for name in self.layers or ():
            if name not in modules:
                raise EspalierError(unknown("layer", name, modules))
        chosen: list[str] = []
        ignored: list[Ignored] = []
        for name, module in modules.items():
            if self.layers is not None and name not in self.layers:
                continue
            reason = self._against(name, module, model, run)
            if reason is None:
                chosen.append(name)
            elif reason:
                ignored.append(Ignored(name, self.kind, reason))
        inputs = example if self.calibration is None else self.calibration
        return BoundBits(self, tuple(chosen), tuple(ignored), inputs)

    def _against(self, name: str, module: nn.Module, model: nn.Module, run: Pass) -> str | None:
        """Why a module can't be quantised; None where it can, "" where nobody would ask."""
        weight = getattr(module, "weight", None)
        weighs = isinstance(weight, Tensor) and weight.dim() > 1
        if next(module.children(), None) is not None and not weighs:
            return ""
        kind = plain_kind(module)
        if kind is None:
            return f"no integer kernel for {type(module).__name__} is chosen" if weighs else ""
        if self.weights_only and kind is not nn.Linear:
            return "weights alone are only packed for linear layers"
        if getattr(module, "padding_mode", "zeros") != "zeros":
            return f"no integer kernel pads by {module.padding_mode!r}"
        calls = len(run.of(name))
        if calls == 0:
            return "its parent uses the weight without calling the layer"
        if calls > 1:
            return "it runs more than once, on inputs of different ranges"
        owners = [n for n, m in model.named_modules() if getattr(m, "weight", None) is weight]
        if len(owners) > 1:
            return f"its weight is shared with {next(o for o in owners if o != name)}"
        return None


class BoundBits(BoundCut):
    """The bits of one model's layers. `inputs`: what ranges are taken from; may be set anew."""

    def __init__(
        self, cut: Bits, names: tuple[str, ...], ignored: tuple[Ignored, ...], inputs: Tensor
    ) -> None:
        self.cut, self.inputs = cut, inputs
        self.names, self.ignored = names, ignored
        self.decisions = tuple(ordinal(f"{cut.kind}:{name}", *cut.options) for name in names)

    @property
    def simulated(self) -> tuple[int, ...]:
        """Options that no kernel of the runtime has: counted in bytes, not felt in time."""
        least = 4 if self.cut.weights_only else 8
        return tuple(bits for bits in self.cut.options if bits < least)

    @property
    def note(self) -> str:
        """What must be known of a decision's options; '' where nothing."""
        if not self.simulated:
            return ""
        bits = " and ".join(map(str, self.simulated))
        return (
            f"{bits} bits are simulated: counted in bytes, no faster than the next kernel there is"
        )

    def layers(self) -> dict[str, tuple[str, ...]]:
        """Each layer's own decision."""
        return {name: (f"{self.cut.kind}:{name}",) for name in self.names}

    def chosen(self, choices: Mapping[str, Option]) -> dict[str, int]:
        """Layer -> bits, of those that are not to stay float."""
        found = {n: self._bits(n, choices) for n in self.names}
        return {name: bits for name, bits in found.items() if bits < FLOAT}

    def whole(self, name: str, choices: Mapping[str, Option]) -> bool:
        """Whether a layer computes on integers, which it also reads and gives."""
        return not self._block and name in self.names and self._bits(name, choices) < FLOAT

    def _bits(self, name: str, choices: Mapping[str, Option]) -> int:
        option: Any = choices.get(f"{self.cut.kind}:{name}", FLOAT)
        return FLOAT if option is None else int(option)

    @property
    def _block(self) -> int:
        return BLOCK if self.cut.weights_only else 0

    def apply(self, model: nn.Module, choices: Mapping[str, Option]) -> None:
        """Layers with fewer than 32 bits become quantised ones, and tensors between them rounded.

        Layers that are gone are passed over. Ranges come from one pass over `inputs`.
        """
        modules = dict(model.named_modules())
        wanted = {
            name: bits
            for name, bits in self.chosen(choices).items()
            if name in modules and plain_kind(modules[name]) is not None
        }
        if not wanted:
            return
        rounded: list[str] = []
        if not self._block:
            run = follow(model, self.inputs[:1])
            ran = {call.path for call in run.calls}
            wanted = {name: bits for name, bits in wanted.items() if name in ran}
            # products give float sums at no cost, convolutions of integers give integers
            closing = [name for name in wanted if not isinstance(modules[name], nn.Linear)]
            rounded = outputs_to_round(run, wanted, closing)
        for name in rounded:
            round_output(modules[name])
        for name, bits in wanted.items():
            put(model, name, quantised(modules[name], bits, self._block))
        calibrate(model, self.inputs)

    def slice(self, name: str, layer: nn.Module, choices: Mapping[str, Option]) -> nn.Module | None:
        """The layer alone, with its input rounded to a range that is made up."""
        bits = self._bits(name, choices) if name in self.names else FLOAT
        if bits >= FLOAT or isinstance(layer, Quantised) or plain_kind(layer) is None:
            return layer
        return quantised(layer, bits, self._block)
