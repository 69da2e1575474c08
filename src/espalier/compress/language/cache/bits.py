"""Numbers of few bits: codes packed into bytes, with a scale and a lowest value a group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from espalier.errors import EspalierError

WIDTHS = (2, 3, 4, 8)  # of codes
_PER = {2: 4, 3: 8, 4: 2, 8: 1}  # codes that fill whole bytes
_NOTE = 2 * 2  # bytes of a group's scale and lowest value, float16 each
_SMALLEST = 2.0**-14  # a scale that float16 holds with all its digits


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes `(..., d)` uint8 below 2^bits as bytes `(..., packed(d, bits))`."""
    per = _PER[bits]
    if per == 1:
        return codes
    short = -codes.shape[-1] % per
    if short:
        codes = torch.nn.functional.pad(codes, (0, short))
    words = codes.reshape(*codes.shape[:-1], -1, per).to(torch.int32)
    steps = torch.arange(per, device=codes.device) * bits
    word = (words << steps).sum(-1, dtype=torch.int32)
    size = per * bits // 8
    parts = [(word >> (8 * i)) & 255 for i in range(size)]
    return torch.stack(parts, -1).flatten(-2).to(torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The `count` codes a row that were packed, uint8 `(..., count)`."""
    per = _PER[bits]
    if per == 1:
        return packed
    size = per * bits // 8
    steps = torch.arange(per, device=packed.device, dtype=torch.int32) * bits
    if size == 1:
        word = packed.unsqueeze(-1)
        steps = steps.to(torch.uint8)
    else:
        shifts = torch.arange(size, device=packed.device, dtype=torch.int32) * 8
        parts = packed.reshape(*packed.shape[:-1], -1, size).to(torch.int32) << shifts
        word = parts.sum(-1, keepdim=True, dtype=torch.int32)
    codes: Tensor = (word >> steps) & (2**bits - 1)
    return codes.flatten(-2)[..., :count].to(torch.uint8)


def packed(count: int, bits: int) -> int:
    """Bytes of a row of `count` codes."""
    per = _PER[bits]
    return -(-count // per) * per * bits // 8


@dataclass
class Rounded:
    """Rows `(b, h, n, d)` on 2^bits levels between each group's lowest and highest value.

    A group is a row (`block` 0), or what one column holds in `block` rows that follow each other.
    Scale and lowest value are float16, computed before the rounding, so that codes stand for what
    is read back (asymmetric rounding; Liu et al., KIVI, 2024, has both kinds of groups).
    """

    codes: Tensor  # (b, h, n, packed d) uint8
    scale: Tensor  # (b, h, n, 1), or (b, h, n / block, d); float16
    low: Tensor
    bits: int
    width: int
    block: int = 0

    @classmethod
    def of(cls, rows: Tensor, bits: int, block: int = 0) -> Rounded:
        """Rounds rows; with a block, their number is a multiple of it. Errors: `EspalierError`."""
        if bits not in WIDTHS:
            raise EspalierError(f"bits of a cache are one of {WIDTHS}, got {bits!r}")
        rows = rows.float()
        grouped = _blocks(rows, block) if block else rows
        axis = 3 if block else -1
        low, high = grouped.amin(axis, keepdim=True), grouped.amax(axis, keepdim=True)
        low = low.half().float()
        scale = ((high - low) / (2**bits - 1)).clamp_min(_SMALLEST).half().float()
        codes = ((grouped - low) / scale).round_().clamp_(0, 2**bits - 1).to(torch.uint8)
        if block:
            codes, scale, low = codes.flatten(2, 3), scale.squeeze(3), low.squeeze(3)
        return cls(pack(codes, bits), scale.half(), low.half(), bits, rows.shape[-1], block)

    def read(self, dtype: torch.dtype) -> Tensor:
        """The rows, as they are now."""
        codes = unpack(self.codes, self.bits, self.width).to(torch.float32)
        scale, low = self.scale.float(), self.low.float()
        if self.block:
            codes = _blocks(codes, self.block)
            codes = torch.addcmul(low.unsqueeze(3), codes, scale.unsqueeze(3)).flatten(2, 3)
        else:
            codes = torch.addcmul(low, codes, scale)
        return codes.to(dtype)

    def fewer(self, bits: int) -> Rounded:
        """The same rows in fewer bits, from the codes alone.

        From 8 to 4 and to 2 bits the levels are nested (255 = 17 * 15, 15 = 5 * 3): codes are
        divided, scales multiplied, lowest values stay (as in PM-KVQ, Liu et al., 2025). To 3 bits
        the rows are rounded anew.
        """
        if bits >= self.bits:
            return self
        ratio = (2**self.bits - 1) / (2**bits - 1)
        if ratio != int(ratio):
            return Rounded.of(self.read(torch.float32), bits, self.block)
        step = int(ratio)
        codes = unpack(self.codes, self.bits, self.width)
        codes = torch.div(codes.to(torch.int16) + step // 2, step, rounding_mode="floor")
        scale = (self.scale.float() * step).half()
        return Rounded(
            pack(codes.to(torch.uint8), bits), scale, self.low, bits, self.width, self.block
        )

    def joined(self, other: Rounded) -> Rounded:
        """These rows, then the other's, which are of the same kind."""
        return self._with(
            torch.cat([self.codes, other.codes], 2),
            torch.cat([self.scale, other.scale], 2),
            torch.cat([self.low, other.low], 2),
        )

    def without(self, rows: int) -> Rounded:
        """All but the first rows: whole blocks of them. Copies, so that memory is freed."""
        groups = rows // self.block if self.block else rows
        return self._with(
            self.codes[:, :, rows:].clone(),
            self.scale[:, :, groups:].clone(),
            self.low[:, :, groups:].clone(),
        )

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Rounded:
        """The same with every tensor changed, along the batch."""
        return self._with(change(self.codes), change(self.scale), change(self.low))

    def _with(self, codes: Tensor, scale: Tensor, low: Tensor) -> Rounded:
        return Rounded(codes, scale, low, self.bits, self.width, self.block)

    def __len__(self) -> int:
        return self.codes.shape[2]

    def tensors(self) -> tuple[Tensor, ...]:
        """What is held."""
        return (self.codes, self.scale, self.low)


def _blocks(rows: Tensor, size: int) -> Tensor:
    return rows.reshape(*rows.shape[:2], -1, size, rows.shape[3])


def rounded_bytes(heads: int, rows: int, width: int, bits: int, block: int = 0) -> int:
    """Bytes of `Rounded` rows of one sequence: codes, scales and lowest values."""
    groups = rows // block * width if block else rows
    return heads * (rows * packed(width, bits) + _NOTE * groups)
