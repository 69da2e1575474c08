"""Weights on few levels: whole numbers with a scale for every block of inputs, rounded three ways.

All take matrices `(..., o, d)`, several at once where they lead with more axes, and Gram matrices of
their inputs `(..., d, d)`; the error they make small is that of the outputs, `(w - w0) G (w - w0)'`.
Weights that are exactly 0 stay 0, so that what was pruned stays pruned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from espalier.compress.removal import inverse_gram
from espalier.errors import EspalierError

BLOCK = 32  # inputs that share a scale
HALF = 16  # bits of a plain 16-bit float, without scales
_LEAST = 1e-12
_SHARES = 24  # of the largest weight: what a scale is tried to cover
_CHUNK = 128  # columns between two updates of all columns behind them
_EXPONENTS = 11


@dataclass(frozen=True)
class Packed:
    """Whole numbers `codes (..., o, d)` int8 and float32 `scales (..., o, blocks)` of `block` inputs.

    `inputs (..., d)`: what the layer's input is multiplied with first, or None. Codes go from
    `-2 ** (bits - 1)` to one less than its opposite, as in ONNX's MatMulNBits with its zero in the
    middle; scales may be negative, so that the side with the larger weights has the extra level.
    """

    codes: Tensor
    scales: Tensor
    bits: int
    block: int
    inputs: Tensor | None = None

    def values(self) -> Tensor:
        """The weights `(..., o, d)` that these stand for, float32."""
        scale = self.scales.repeat_interleave(self.block, -1)[..., : self.codes.shape[-1]]
        found = self.codes.to(torch.float32) * scale
        return found if self.inputs is None else found * self.inputs[..., None, :]

    @property
    def bytes(self) -> int:
        """Bytes as packed: codes of `bits` bits, scales and, where there are, factors of inputs."""
        size = packed_bytes(self.codes, self.bits, self.block)
        return size + (0 if self.inputs is None else 4 * self.inputs.numel())


Method = Callable[[Tensor, "Tensor | None", int, int], Packed]


def packed_bytes(weight: Tensor | Sequence[int], bits: int, block: int = BLOCK) -> int:
    """Bytes of a weight `(..., o, d)`, or of one of that shape, at a number of bits.

    Up to 8 bits: blocks of inputs filled up, `bits` a weight, and a float32 a block, as in ONNX's
    MatMulNBits. 16 and 32: floats.
    """
    *rows, inputs = weight.shape if isinstance(weight, Tensor) else weight
    count = math.prod(rows)
    if bits >= HALF:
        return count * inputs * bits // 8
    blocks = -(-inputs // block)
    return count * blocks * (-(-block * bits // 8) + 4)


def nearest(weight: Tensor, gram: Tensor | None, bits: int, block: int = BLOCK) -> Packed:
    """Each weight on the nearest level; scales of least squared error of the weights."""
    scales = fitted_scales(_blocks(weight.float(), block), bits).double()
    return Packed(_codes(weight.double(), scales, bits, block), scales.float(), bits, block)


def aware(weight: Tensor, gram: Tensor | None, bits: int, block: int = BLOCK) -> Packed:
    """Inputs that are large get finer levels: weights are multiplied by s before they are rounded,
    and inputs divided by it. s is the inputs' size to the power of least output error, of a grid
    from 0 to 1 (Lin et al., AWQ, 2023, https://arxiv.org/abs/2306.00978; there the mean of |x|, here
    the root of the mean of x^2)."""
    g = _needed(gram, "aware")
    w = weight.double()
    size = g.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    size = size / size.mean(-1, keepdim=True).clamp_min(_LEAST)
    size = torch.where(size > 0, size, 1.0).clamp_min(1e-4)
    best: Packed | None = None
    least = torch.full(w.shape[:-2], math.inf, dtype=w.dtype, device=w.device)
    for exponent in torch.linspace(0, 1, _EXPONENTS).tolist():
        s = (size**exponent).float().double()
        s = s / (s.amax(-1, keepdim=True) * s.amin(-1, keepdim=True)).sqrt()
        plain = nearest(w * s[..., None, :], None, bits, block)
        tried = Packed(plain.codes, plain.scales, bits, block, (1 / s).float())
        error = output_error(tried.values(), w, g)
        better = error < least
        least = torch.where(better, error, least)
        best = tried if best is None else _choose(better, tried, best)
    assert best is not None
    return best


def compensating(weight: Tensor, gram: Tensor | None, bits: int, block: int = BLOCK) -> Packed:
    """Column by column; what rounding a column changes in the outputs is taken up by the columns
    that are not rounded yet (Frantar et al., GPTQ, 2022, https://arxiv.org/abs/2210.17323), the
    largest inputs first. Scales are fitted to the weights before that."""
    g, w, most = _needed(gram, "error"), weight.double(), largest(bits)
    scales = fitted_scales(_blocks(weight.float(), block), bits).double()
    each = scales.repeat_interleave(block, -1)[..., : w.shape[-1]]

    def level(now: Tensor, scale: Tensor) -> Tensor:
        return (now / scale).round().clamp(-most - 1, most) * scale

    found = column_by_column(w, g, level, each)
    return Packed(_codes(found, scales, bits, block), scales.float(), bits, block)


METHODS: dict[str, Method] = {"nearest": nearest, "aware": aware, "error": compensating}


def column_by_column(
    weight: Tensor,
    gram: Tensor,
    level: Callable[[Tensor, Tensor], Tensor],
    settings: Tensor,
    *,
    damp: float = 0.01,
    chunk: int = _CHUNK,
) -> Tensor:
    """Rounds the columns of `weight (..., o, d)`, largest inputs first; the error of each moves those
    that come later.

    `level(now (..., o), setting (..., o))` rounds a column; settings `(..., o, d)` go with the
    weights, such as their scales. `damp` is in units of the mean of the Gram matrix's diagonal.
    """
    order = gram.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
    columns = order[..., None, :].expand_as(weight)
    now, settings = weight.gather(-1, columns), settings.gather(-1, columns)
    across = order[..., None, :].expand_as(gram)
    gram = gram.gather(-1, across).gather(-2, across.mT)
    upper = torch.linalg.cholesky(inverse_gram(gram, damp), upper=True)
    stays = now != 0
    for low in range(0, weight.shape[-1], chunk):
        high = min(low + chunk, weight.shape[-1])
        errors = torch.zeros_like(now[..., low:high])
        for column in range(low, high):
            rounded = level(now[..., column], settings[..., column]) * stays[..., column]
            step = (now[..., column] - rounded) / upper[..., column, column, None]
            now[..., column] = rounded
            rest = upper[..., None, column, column + 1 : high]
            now[..., column + 1 : high] -= step[..., None] * rest
            errors[..., column - low] = step
        now[..., high:] -= errors @ upper[..., low:high, high:]  # all later columns at once
    return torch.empty_like(now).scatter(-1, columns, now)


def fitted_scales(rows: Tensor, bits: int) -> Tensor:
    """A scale `(...)`, of either sign, for each row `(..., n)` of weights, of least squared error:
    few bits gain by clipping the largest weights (Banner et al., 2019)."""
    most = largest(bits)
    whole = (rows.abs().amax(-1) / (most + 1)).clamp_min(_LEAST)
    best, least = whole.clone(), torch.full_like(whole, math.inf)
    for share in torch.linspace(1.0, 0.4, _SHARES).tolist():
        for signed in (share, -share):
            scale = (whole * signed)[..., None]
            level = (rows / scale).round().clamp(-most - 1, most) * scale
            error = (level - rows).square().sum(-1)
            best = torch.where(error < least, scale[..., 0], best)
            least = torch.minimum(error, least)
    return best


def repack(weight: Tensor, bits: int, block: int = BLOCK) -> Packed:
    """The whole numbers and scales of weights `(..., o, d)` that are on such levels already.

    Errors: `EspalierError` where a block is not on `bits` bits' levels of any scale.
    """
    rows = _blocks(weight.detach().double(), block)
    top, most = rows.abs().amax(-1), largest(bits)
    scales, found = torch.ones_like(top), top == 0
    for code in range(most + 1, 0, -1):  # the largest weight of a block has one of these
        for signed in (code, -code):
            scale = torch.where(top > 0, top / signed, 1.0)
            ratio = rows / scale[..., None]
            whole = ratio.round()
            near = ((ratio - whole).abs() < 2e-3 / code) & (whole <= most)
            fits = near.all(-1) & ~found
            scales, found = torch.where(fits, scale, scales), found | fits
    if not bool(found.all()):
        share = float((~found).double().mean())
        raise EspalierError(
            f"{share:.0%} of the blocks of {block} weights are not on {bits}-bit levels: round them first"
        )
    return Packed(_codes(weight.double(), scales, bits, block), scales.float(), bits, block)


def output_error(rounded: Tensor, weight: Tensor, gram: Tensor) -> Tensor:
    """Squared error of the outputs `(...)`, summed over rows."""
    off = rounded.double() - weight.double()
    return ((off @ gram.double()) * off).sum((-2, -1))


def largest(bits: int) -> int:
    """The largest whole number of a weight with so many bits; the smallest is 1 further from 0."""
    return int(2 ** (bits - 1)) - 1


def _blocks(weight: Tensor, block: int) -> Tensor:
    short = -weight.shape[-1] % block
    padded = torch.nn.functional.pad(weight, (0, short))
    return padded.reshape(*weight.shape[:-1], -1, block)


def _codes(weight: Tensor, scales: Tensor, bits: int, block: int) -> Tensor:
    rows, most = _blocks(weight, block), largest(bits)
    whole = (rows / scales[..., None]).round().clamp(-most - 1, most).to(torch.int8)
    return whole.flatten(-2)[..., : weight.shape[-1]].contiguous()


def _choose(better: Tensor, new: Packed, old: Packed) -> Packed:
    assert new.inputs is not None
    assert old.inputs is not None
    each = better[..., None, None]
    return Packed(
        torch.where(each, new.codes, old.codes),
        torch.where(each, new.scales, old.scales),
        new.bits,
        new.block,
        torch.where(better[..., None], new.inputs, old.inputs),
    )


def _needed(gram: Tensor | None, method: str) -> Tensor:
    if gram is None:
        raise EspalierError(
            f"rounding by {method!r} needs the layer's inputs: give calibration, or use 'nearest'"
        )
    return gram.double()
