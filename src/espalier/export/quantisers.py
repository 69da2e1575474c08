"""Fake quantisation: layers that compute, in float, what integer kernels compute.

Activations are unsigned 8-bit numbers with one scale and zero point a tensor, weights signed ones
with a scale a channel: what ONNX Runtime's integer kernels are fast with (signed activations are
slower than float there). Rounding passes gradients on (straight through), so such networks train.
Source: Jacob et al., Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference, 2018.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from espalier.errors import EspalierError

LEVELS = 255  # the largest unsigned 8-bit number
FLOAT = 32  # bits of what is not quantised
BLOCK = 32  # inputs that share a scale where weights alone are quantised
_LEAST = 1e-12


class Quantiser(nn.Module):
    """Rounds a tensor to 256 levels, `scale * (q - zero_point)` with q from 0 to 255.

    Until `set_range` it takes 0 to 12.75: enough to time a layer, not to use it.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(0.05))
        self.register_buffer("zero_point", torch.tensor(0, dtype=torch.int32))
        self.look: Callable[[Tensor], None] | None = None  # told the inputs, in place of rounding

    def set_range(self, low: float, high: float) -> None:
        """Covers `low` to `high`; zero is always one of the levels, as padding needs it."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = max((high - low) / LEVELS, _LEAST)
        self.scale.fill_(scale)
        self.zero_point.fill_(min(max(round(-low / scale), 0), LEVELS))

    def forward(self, x: Tensor) -> Tensor:
        """`x` on the levels, or as it is while its range is being looked at."""
        if self.look is not None:
            self.look(x)
            return x
        if _exporting():
            return _on_levels(x, self.scale, self.zero_point, 0, LEVELS)
        made: Tensor = fake_quantize(x, self.scale, self.zero_point, LEVELS)
        return made


class Quantised(nn.Module):
    """What quantised layers have: `bits` of a weight, its scales, and a quantiser of the input.

    Scales follow the weights, so that whatever changes these (training, a repair) needs no more.
    `block` 0: a scale an output channel, the input is quantised too. Otherwise weights alone are
    quantised, every `block` inputs of an output with a scale of their own.
    """

    bits: int
    block: int
    weight: Any  # the layer's own parameter
    weight_scale: Tensor
    input_quantiser: nn.Module

    def _quantise(self, bits: int, block: int) -> None:
        self.bits, self.block = bits, block
        self.input_quantiser = nn.Identity() if block else Quantiser()
        self._fitted: tuple[int, int] | None = None
        self.register_buffer("weight_scale", torch.empty(0))
        self.scales()

    @property
    def most(self) -> int:
        """The largest whole number a weight takes; the smallest is its opposite."""
        return int(2 ** (self.bits - 1)) - 1

    def rows(self) -> Tensor:
        """The weight with one row for each scale `(scales, n)`; short blocks filled with zeros."""
        flat: Tensor = self.weight.flatten(1)
        if not self.block:
            return flat
        short = -flat.shape[1] % self.block
        return functional.pad(flat, (0, short)).reshape(-1, self.block)

    def scales(self) -> Tensor:
        """The scales of the weights as they are now: fitted again where those have changed."""
        weight = self.weight
        now = (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
        if now != self._fitted:
            with torch.inference_mode(False):  # they must stay of use in training
                self.weight_scale = self._fit()
            self._fitted = now
        return self.weight_scale

    @torch.no_grad()
    def _fit(self) -> Tensor:
        """Those of least squared error, of 24 tried."""
        rows = self.rows()
        whole = (rows.abs().amax(dim=1) / self.most).clamp_min(_LEAST)
        best, least = whole.clone(), torch.full_like(whole, float("inf"))
        # few bits gain by clipping the largest weights (Banner et al., 2019)
        for share in torch.linspace(1.0, 0.4, 24):
            scale = whole * share
            rounded = (rows / scale[:, None]).round().clamp(-self.most, self.most)
            error = (rounded * scale[:, None] - rows).square().sum(dim=1)
            best, least = (
                torch.where(error < least, scale, best),
                torch.minimum(error, least),
            )
        return best

    def rounded_weight(self) -> Tensor:
        """The weight on its levels, in its own shape; gradients go through."""
        rows, most = self.rows(), self.most
        zero = torch.zeros(len(rows), dtype=torch.int32, device=rows.device)
        if _exporting():
            rounded = _on_levels(rows, self.weight_scale[:, None], zero[:, None], -most, most)
        else:
            scales = self.scales()
            rounded = torch.fake_quantize_per_channel_affine(rows, scales, zero, 0, -most, most)
        if self.block:
            outputs, inputs = self.weight.flatten(1).shape
            rounded = rounded.reshape(outputs, -1)[:, :inputs]
        return rounded.reshape(self.weight.shape)

    def weight_bytes(self) -> int:
        """Bytes of the weight as it is stored: whole numbers, and a float32 for each scale."""
        rows = self.rows() if self.block else self.weight
        return -(-rows.numel() * self.bits // 8) + 4 * self.weight_scale.numel()


class QuantisedConv1d(Quantised, nn.Conv1d):
    """A convolution of quantised numbers."""

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Conv1d`, input and weight rounded."""
        x, weight = self.input_quantiser(input), self.rounded_weight()
        made: Tensor = self._conv_forward(x, weight, self.bias)
        return made


class QuantisedConv2d(Quantised, nn.Conv2d):
    """A convolution of quantised numbers."""

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Conv2d`, input and weight rounded."""
        x, weight = self.input_quantiser(input), self.rounded_weight()
        made: Tensor = self._conv_forward(x, weight, self.bias)
        return made


class QuantisedLinear(Quantised, nn.Linear):
    """A linear layer of quantised numbers, or with quantised weights alone."""

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Linear`, weight and, unless weights alone are quantised, input rounded."""
        return functional.linear(self.input_quantiser(input), self.rounded_weight(), self.bias)


_KINDS: dict[type[nn.Module], type[Quantised]] = {
    nn.Conv1d: QuantisedConv1d,
    nn.Conv2d: QuantisedConv2d,
    nn.Linear: QuantisedLinear,
}


def plain_kind(layer: nn.Module) -> type[nn.Module] | None:
    """Which of Conv1d, Conv2d and Linear the layer is and computes as; None for anything else."""
    for kind in _KINDS:
        own = ("forward", "_conv_forward")
        same = all(getattr(type(layer), n, None) is getattr(kind, n, None) for n in own)
        if isinstance(layer, kind) and same:
            return kind
    return None


def quantised(layer: nn.Module, bits: int, block: int = 0) -> Quantised:
    """The layer with `bits` a weight; it shares the layer's parameters. The layer is left alone.

    Errors: `EspalierError` for another kind of layer, and for weights alone of no linear one.
    """
    kind = plain_kind(layer)
    if kind is None or (block and kind is not nn.Linear):
        what = "weights alone of linear layers" if block else "Conv1d, Conv2d and Linear"
        raise EspalierError(f"only {what} can be quantised, got {type(layer).__name__}")
    made = _shared(layer, _KINDS[kind])
    assert isinstance(made, Quantised)
    made._quantise(bits, block)
    return made


def unquantised(layer: Quantised) -> nn.Module:
    """The plain layer that a quantised one was made from, with its parameters as they are now."""
    kind = next(plain for plain, made in _KINDS.items() if isinstance(layer, made))
    plain = _shared(layer, kind)
    for name in ("bits", "block", "_fitted"):
        plain.__dict__.pop(name, None)
    plain._buffers.pop("weight_scale", None)
    plain._modules.pop("input_quantiser", None)
    return plain


def _shared(layer: nn.Module, kind: type[nn.Module]) -> nn.Module:
    made = kind.__new__(kind)
    # dictionaries are copied, so that what is registered on one is not on the other
    made.__dict__ = {k: v.copy() if isinstance(v, dict) else v for k, v in vars(layer).items()}
    return made


_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


def _on_levels(x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
    """What torch's fake quantisation gives, in operators that torch.export knows the shapes of."""
    whole = torch.round(x * (1.0 / scale)) + zero
    return (whole.clamp(low, high) - zero) * scale


@torch.library.custom_op("espalier::fake_quantize", mutates_args=())
def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, most: int) -> Tensor:
    """What `torch.fake_quantize_per_tensor_affine` gives, of finite float32 to the bit, for levels 0
    to `most`.

    On the processor that one takes about five times as long for a batch: it is not vectorised. See
    benchmarks/rounding_speed.py.
    """
    if x.device.type != "cpu":
        return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, most)
    step, zero = float(scale), int(zero_point)
    return (x * (1.0 / step)).round_().clamp_(-zero, most - zero).mul_(step)


@fake_quantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, most: int) -> Tensor:
    return torch.empty_like(x)


def _remember(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:
    x, scale, zero_point, ctx.most = inputs
    ctx.save_for_backward(x, scale, zero_point)


def _straight_through(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    x, scale, zero = ctx.saved_tensors
    if x.device.type != "cpu" or torch.compiler.is_compiling() or type(scale) is not Tensor:
        # a compiler has no numbers to read
        whole = (x * (1.0 / scale)).round_().add_(zero)
        return grad * ((whole >= 0) & (whole <= ctx.most)), None, None, None
    whole, low = (x * (1.0 / float(scale))).round_(), -int(zero) - 0.5
    # one pass: what lies between passes its gradient on
    through = torch.ops.aten.hardtanh_backward(grad, whole, low, low + ctx.most + 1)
    return through, None, None, None


fake_quantize.register_autograd(_straight_through, setup_context=_remember)


def round_output(module: nn.Module, quantiser: Quantiser | None = None) -> None:
    """Puts a quantiser on what a module gives, as its child `output_quantiser`."""
    module.add_module("output_quantiser", quantiser or Quantiser())
    module.register_forward_hook(_rounded)


def _rounded(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    made: Tensor = module.get_submodule("output_quantiser")(output)
    return made


def carries(network: nn.Module) -> bool:
    """Whether anything in the network is quantised."""
    return any(isinstance(module, (Quantised, Quantiser)) for module in network.modules())
